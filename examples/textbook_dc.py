"""Dataset condensation (DC) as a textbook has it, and in five lines the mutual-information term.

The lines that end in "# mim4dd" are the whole change; without them this is the plain loop.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import mim4dd  # mim4dd


def make_network():
    """A small convolutional network for 8x8 images."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )


def distance(gradients, real_gradients):
    """One minus the cosine of every row of every weight matrix, summed."""
    pairs = [
        (a.flatten(1), b.flatten(1)) for a, b in zip(gradients, real_gradients, strict=True) if a.ndim > 1
    ]
    return sum((1 - F.cosine_similarity(a, b)).sum() for a, b in pairs)


def condense(images, labels, iterations, batch=64):
    """Return one synthetic image for each of ten classes, [10, 1, 8, 8]."""
    synthetic = torch.stack([images[labels == c][0] for c in range(10)]).requires_grad_()
    synthetic_labels = torch.arange(10)
    optimizer = torch.optim.SGD([synthetic], lr=0.1, momentum=0.5)
    term = mim4dd.MutualInformation(weight=1.0)  # mim4dd
    for _ in range(iterations):
        network = make_network()
        weights = [*network.parameters()]
        loss = 0
        for c in range(10):
            real = images[labels == c]
            real = real[torch.randperm(len(real))[:batch]]
            real_loss = F.cross_entropy(network(real), torch.full((len(real),), c))
            real_gradients = torch.autograd.grad(real_loss, weights)
            own_loss = F.cross_entropy(network(synthetic[c : c + 1]), synthetic_labels[c : c + 1])
            gradients = torch.autograd.grad(own_loss, weights, create_graph=True)
            loss = loss + distance(gradients, real_gradients)
        index = torch.randperm(len(images))[:256]  # mim4dd
        features, real_features = network[:-1](synthetic), network[:-1](images[index]).detach()  # mim4dd
        loss = loss + term(features, real_features, synthetic_labels, labels[index])  # mim4dd
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return synthetic.detach()


def accuracy(synthetic, images, labels, epochs=200):
    """Train a new network on one image per class; return the share of images it classifies rightly."""
    network = make_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        optimizer.zero_grad()
        F.cross_entropy(network(synthetic), torch.arange(10)).backward()
        optimizer.step()
    return (network(images).argmax(1) == labels).float().mean().item()


if __name__ == "__main__":
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    train, test = slice(0, 1400), slice(1400, None)
    for iterations in (0, 100):
        synthetic = condense(images[train], labels[train], iterations)
        share = accuracy(synthetic, images[test], labels[test])
        print(f"{iterations} iterations: {share:.1%} of the test images")
