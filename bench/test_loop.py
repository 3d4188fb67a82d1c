"""The loop, step against step: each of its parts (steps.py) beside the textbook version, in one run.

    python -m pytest bench/test_loop.py --benchmark-enable --benchmark-json=loop.json
    python -m bench.report loop.json

A case is one step, its versions measured in turn: `textbook`, then ours in float32 and, where the hardware
has it, in bfloat16; and the other way to do it: networks of the evaluation `stacked` or `alone`, and on a GPU
`launched`, that is without CUDA graphs, a trajectory that keeps the graph of one step only (`constant`), or a
network that inductor has `compiled`. First, in float32 and without augmentation, both must give the same loss
and the same gradient from the same weights. On a GPU a step is timed with a synchronisation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from bench import baselines, measure
from bench.problems import STRATEGY, real_images, synthetic_images
from bench.steps import NETWORKS, OURS, STEP_SIZE, TEXTBOOK, problem, setting, trajectory
from mim4dd import evaluation, graph, networks, stacked
from mim4dd.data import ImageSet
from mim4dd.networks import blocks, convolution, precision
from mim4dd.objectives import METHODS, Problem, base, distribution, gradient, trajectory_distance
from mim4dd.seeding import generator
from mim4dd.stacked import Stack

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ROUNDS = {"cpu": 2, "cuda": 10}
EVALUATIONS = {"cpu": 2, "cuda": 1}


def versions(device: str, step: str) -> list[str]:
    best = precision.resolve("auto", torch.device(device))
    names = ["textbook", "fp32", *([] if best == "fp32" else [best])]
    # How it is not done without being told to.
    if device == "cpu":
        return [*names, *(["fp32 stacked"] if step == "evaluation" else [])]
    if step == "evaluation":  # launched, it takes as long as the textbook's
        return [*names, "fp32 alone"]
    others = {"mtt": [f"{best} constant"], "dm": ["fp32 compiled"]}
    return [*names, *others.get(step, []), "fp32 launched"]


def way(name: str, device: str) -> AbstractContextManager[object]:
    """The context in which a version is what its name says."""
    if name.endswith("launched"):
        return mock.patch.object(graph, "WARM_UP", math.inf)
    if name.endswith("constant"):
        return mock.patch.object(Problem, "graphs_kept", return_value=0)
    if name.endswith("compiled"):
        return mock.patch.object(base, "create", compiled)
    if name.endswith(("stacked", "alone")):
        return mock.patch.dict(stacked.LARGEST_STACK, {device: NETWORKS if name.endswith("stacked") else 1})
    return nullcontext()


def compiled(*arguments: Any, **options: Any) -> networks.Network:
    """A network whose features inductor computes."""
    network = networks.create(*arguments, **options)
    network.features = torch.compile(network.features, dynamic=False)
    return network


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Within the tolerance of the largest number: sums differ in their order."""
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"relative error {error:.1e}"


@pytest.fixture
def small():
    """As many real images in a class as are drawn, so that both sides use them all."""

    def make(device: str) -> tuple[Problem, Tensor]:
        of = problem(real_images(16, device), "none", "fp32")
        return dataclasses.replace(of, real_batch=16, width=32), synthetic_images(of)

    return make


@pytest.fixture(autouse=True)
def float32_convolutions():
    precision.configure("fp32")


@pytest.fixture(params=["torch's convolutions", "open ReLUs"])
def comparable(request, monkeypatch):
    """Makes small errors stay small: other roundings may open a ReLU that is shut on the other side.

    So either both sides have the same convolutions, or ours has its own and every ReLU is open. On a GPU the
    library chooses by size and layout, which are not the same on both sides.
    """
    if request.param != "open ReLUs" and request.getfixturevalue("device") == "cuda":
        pytest.skip("both sides would need the same algorithm of cuDNN")

    def opened(network, random):
        initialise(network, random)
        for module in network.modules():
            if isinstance(module, torch.nn.GroupNorm):
                torch.nn.init.constant_(module.bias, 6.0)

    initialise = networks.initialise
    if request.param == "open ReLUs":
        for module in (networks, distribution, gradient):
            monkeypatch.setattr(module, "initialise", opened)
    else:
        monkeypatch.setattr(convolution, "_is_compiled", lambda *_: False)
        monkeypatch.setattr(blocks, "is_compiled", lambda *_: False)


@pytest.mark.usefixtures("comparable")
@pytest.mark.parametrize("method", ["dm", "dc"])
@pytest.mark.parametrize("device", DEVICES)
def test_matching_is_that_of_the_textbook(device, method, small):
    of, images = small(device)
    objective = METHODS[method].objective(of)
    ours = images.clone().requires_grad_()
    objective.prepare(images, of.labels)
    loss = objective.match(ours, of.labels).loss
    loss.backward(inputs=[ours])
    plain = setting(of, images, [*objective.network.parameters()])
    optimizer = torch.optim.SGD([plain.images], lr=0.0)
    if method == "dm":
        expected = baselines.distribution_step(plain, optimizer)
    else:
        expected = baselines.gradient_step(plain, plain.network(), optimizer)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    close(ours.grad, plain.images.grad)


@pytest.mark.usefixtures("comparable")
@pytest.mark.parametrize("device", DEVICES)
def test_the_trained_network_is_that_of_the_textbook(device, small):
    """The protocol of the evaluation, three epochs; the inner step is one of them without momentum."""
    of, images = small(device)
    network = of.network().requires_grad_()
    networks.initialise(network, generator(0, "bench/start", torch.device(device)))
    plain = setting(of, images, [p.detach().clone() for p in network.parameters()])
    protocol = evaluation.Protocol(3, "none", width=of.width)
    stack = Stack.of(network, generator(0, "bench/train", torch.device(device)))
    evaluation.train(stack, [(images, of.labels)], protocol)
    theirs = plain.network()
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2])
    for _ in range(3):
        baselines.train_epoch(plain, theirs, optimizer)
        schedule.step()
    for ours, expected in zip(network.parameters(), theirs.parameters(), strict=True):
        close(ours, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_trajectory_matching_is_that_of_the_textbook(device, small):
    """In float64: in float32 a ReLU that opens on one side only moves either gradient by up to a percent."""
    of, images = small(device)
    start, target = ({name: w.double() for name, w in weights.items()} for weights in trajectory(of))
    ours = images.double().requires_grad_()
    loss = trajectory_distance(
        of.network().double(), start, target, ours, of.labels, steps=3, step_size=STEP_SIZE
    )
    loss.backward()
    plain = setting(of, images.double())
    expected = baselines.trajectory_step(plain, [*start.values()], [*target.values()], 3, STEP_SIZE)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    close(ours.grad, plain.images.grad, 1e-9)


def version(step: str, name: str, real: ImageSet, device: str) -> Callable[[], None]:
    """The step as a version does it, after a first call, which takes longer than the others."""
    of = problem(real, "none" if step == "dc" else STRATEGY, name)
    assert of.chunk  # worked out with a copy of the network, which would have the features of a compiled one
    with way(name, device):
        call = (TEXTBOOK if name == "textbook" else OURS)[step](of, synthetic_images(of))

    def done() -> None:
        with way(name, device):
            call()

    warms_up_by_itself = step == "evaluation" and (device == "cuda" or name == "textbook")  # it is that long
    if not warms_up_by_itself:
        done()
    return done


@pytest.mark.parametrize("step", OURS)
@pytest.mark.parametrize("device", DEVICES)
def test_loop(benchmark, device, step):
    if benchmark.disabled:
        pytest.skip("only the equality is tested where nothing is timed")
    real = real_images(6000, device)
    calls = {name: version(step, name, real, device) for name in versions(device, step)}
    rounds = EVALUATIONS[device] if step == "evaluation" else ROUNDS[device]
    benchmark.extra_info["seconds"] = measure.in_turn(benchmark, calls, device, rounds)
