"""The teacher of soft labels."""

import dataclasses

import pytest
import torch
from conftest import close

from mim4dd import networks, teacher
from mim4dd.data import load
from mim4dd.evaluation import Protocol, accuracy
from mim4dd.seeding import generator


@pytest.mark.parametrize(
    ("images", "batch", "epochs"), [(100, 256, 500), (300, 256, 250), (1438, 256, 83), (1438, 2, 1)]
)
def test_it_takes_about_500_steps_and_at_least_an_epoch(monkeypatch, images, batch, epochs):
    trained = []
    monkeypatch.setattr(teacher, "train_on_real", lambda *arguments: trained.append(arguments))
    train, _ = load("digits")
    real = dataclasses.replace(train, images=train.images[:images], labels=train.labels[:images])
    network = networks.create("mlp", 1, 10, (8, 8))
    teacher.teach(network, real, Protocol(7, "none", batch=batch), generator(0, "teacher"))
    ((_, seen, protocol, _),) = trained
    assert seen is real
    assert (protocol.epochs, protocol.batch) == (epochs, batch)


def test_it_learns_and_gives_probabilities():
    train, test = load("digits")
    network = networks.create("mlp", 1, 10, (8, 8))
    teacher.teach(network, train, Protocol(1, "none"), generator(0, "teacher"))
    assert accuracy(network, test) > 0.9
    given = teacher.probabilities(network, test.batch(torch.arange(100)))
    torch.testing.assert_close(given.sum(1), torch.ones(100))
    assert (given.argmax(1) == test.labels[:100]).float().mean() > 0.9


def test_what_it_says_of_an_image_does_not_depend_on_the_others(monkeypatch):
    monkeypatch.setattr(teacher, "STEPS", 20)
    train, test = load("digits")
    network = networks.create("convnet-bn", 1, 10, (8, 8), width=8)
    teacher.teach(network, train, Protocol(1, "none", batch=1438), generator(0, "teacher"))
    images = test.batch(torch.arange(20))
    alone = torch.cat([teacher.probabilities(network, image[None]) for image in images])
    close(teacher.probabilities(network, images), alone)
