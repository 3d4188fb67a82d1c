"""The textbook loops that mim4dd is measured against, written plainly from the published algorithms.

As public code does it: one class after another in Python, float32, every augmentation as a string of tensor
operators, a module built anew for every network, a DataLoader for the evaluation, losses read when they are
there. The real images are float32 tensors on the device, which is what the faster ones of them do.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

# ------------------------------------------------------------------------------------------------ the network


class ConvNet(nn.Module):
    """Three times convolution, instance normalisation, ReLU, average pooling; then a linear classifier."""

    def __init__(self, channels: int, num_classes: int, width: int, side: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for k in range(3):
            padding = 3 if k == 0 and side == 28 else 1
            layers += [
                nn.Conv2d(channels if k == 0 else width, width, 3, padding=padding),
                nn.GroupNorm(width, width),
                nn.ReLU(),
                nn.AvgPool2d(2),
            ]
        self.features = nn.Sequential(*layers)
        last = (32 if side == 28 else side) // 8
        self.classifier = nn.Linear(width * last * last, num_classes)

    def embed(self, x: Tensor) -> Tensor:
        return self.features(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.embed(x))


# ------------------------------------------------------------------------------------------- the augmentation


class Draw:
    """One number per image, or, with a seed, one for all: the same on the real and the synthetic side."""

    def __init__(self, x: Tensor, seed: int | None) -> None:
        self.batch, self.device = len(x), x.device
        self.rows = self.batch if seed is None else 1
        self.generator = None if seed is None else torch.Generator(x.device).manual_seed(seed)

    def uniform(self) -> Tensor:
        return torch.rand(self.rows, device=self.device, generator=self.generator).expand(self.batch)

    def integers(self, low: int, high: int) -> Tensor:
        size = (self.rows,)
        drawn = torch.randint(low, high, size, device=self.device, generator=self.generator)
        return drawn.expand(self.batch)


def per_image(value: Tensor) -> Tensor:
    return value[:, None, None, None]


def color(x: Tensor, draw: Draw) -> Tensor:
    x = x + per_image(draw.uniform() - 0.5)
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * per_image(draw.uniform() * 2) + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * per_image(draw.uniform() + 0.5) + mean


def grid(x: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
    ranges = [torch.arange(n, device=x.device) for n in (len(x), height, width)]
    return torch.meshgrid(*ranges, indexing="ij")


def crop(x: Tensor, draw: Draw) -> Tensor:
    height, width = x.shape[2:]
    image, row, column = grid(x, height, width)
    reach = int(height * 0.125 + 0.5)
    row = (row + draw.integers(-reach, reach + 1)[:, None, None] + 1).clamp(0, height + 1)
    column = (column + draw.integers(-reach, reach + 1)[:, None, None] + 1).clamp(0, width + 1)
    padded = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1).contiguous()
    return padded[image, row, column].permute(0, 3, 1, 2).contiguous()


def cutout(x: Tensor, draw: Draw) -> Tensor:
    height, width = x.shape[2:]
    box = int(height * 0.5 + 0.5)
    image, row, column = grid(x, box, box)
    row = row + draw.integers(0, height + 1 - box % 2)[:, None, None] - box // 2
    column = column + draw.integers(0, width + 1 - box % 2)[:, None, None] - box // 2
    mask = torch.ones(len(x), height, width, device=x.device)
    mask[image, row.clamp(0, height - 1), column.clamp(0, width - 1)] = 0
    return x * mask[:, None]


def flip(x: Tensor, draw: Draw) -> Tensor:
    return torch.where(per_image(draw.uniform()) < 0.5, x.flip(3), x)


def warp(x: Tensor, matrix: Tensor) -> Tensor:
    points = F.affine_grid(F.pad(matrix, (0, 1)), list(x.shape), align_corners=True)
    return F.grid_sample(x, points, align_corners=True)


def scale(x: Tensor, draw: Draw) -> Tensor:
    factors = [draw.uniform() * (1.2 - 1 / 1.2) + 1 / 1.2 for _ in range(2)]
    return warp(x, torch.diag_embed(torch.stack(factors, 1)))


def rotate(x: Tensor, draw: Draw) -> Tensor:
    angle = (draw.uniform() * 2 - 1) * 15 * math.pi / 180
    rows = [torch.stack([angle.cos(), -angle.sin()], 1), torch.stack([angle.sin(), angle.cos()], 1)]
    return warp(x, torch.stack(rows, 1))


OPS = {"color": color, "crop": crop, "cutout": cutout, "flip": flip, "scale": scale, "rotate": rotate}


def augmented(x: Tensor, part: str | None, seed: int | None = None) -> Tensor:
    """One part of the strategy; without a seed, new numbers for every image."""
    return x if part is None else OPS[part](x, Draw(x, seed))


# ------------------------------------------------------------------------------------------------- the loops


@dataclass
class Setting:
    """What every loop works on.

    Attributes:
        real: float32 [N, C, H, W], normalised.
        classes: the indices of the real images of each class.
        images: the synthetic images float32 [classes * ipc, C, H, W], class by class, wanting a gradient.
        labels: int64, theirs.
        real_batch: real images of a class per step.
        width: of the network.
        parts: of the augmentation; none: no augmentation.
        weights: to start every network from, in the order of its parameters; None: random ones.
    """

    real: Tensor
    classes: list[Tensor]
    images: Tensor
    labels: Tensor
    real_batch: int
    width: int
    parts: Sequence[str]
    weights: Sequence[Tensor] | None = None

    @property
    def ipc(self) -> int:
        return len(self.images) // len(self.classes)

    def network(self) -> ConvNet:
        channels, side = self.images.shape[1], self.images.shape[2]
        network = ConvNet(channels, len(self.classes), self.width, side).to(self.images)
        if self.weights is not None:
            with torch.no_grad():
                for parameter, weight in zip(network.parameters(), self.weights, strict=True):
                    parameter.copy_(weight)
        return network

    def part(self) -> str | None:
        return random.choice(self.parts) if self.parts else None

    def batches(self, c: int) -> tuple[Tensor, Tensor]:
        """Real and synthetic images of a class, augmented alike."""
        members = self.classes[c]
        chosen = members[torch.randperm(len(members), device=members.device)[: self.real_batch]]
        part, seed = self.part(), random.randrange(2**31)
        real = augmented(self.real[chosen], part, seed)
        return real, augmented(self.images[c * self.ipc : (c + 1) * self.ipc], part, seed)


def distribution_step(setting: Setting, optimizer: torch.optim.Optimizer) -> float:
    """One iteration of distribution matching (DM, WACV 2023)."""
    network = setting.network().requires_grad_(False)
    loss = torch.zeros((), device=setting.images.device)
    for c in range(len(setting.classes)):
        real, synthetic = setting.batches(c)
        difference = network.embed(real).mean(0) - network.embed(synthetic).mean(0)
        loss = loss + difference.square().sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def layer_distance(synthetic: Tensor, real: Tensor) -> Tensor:
    """One minus the cosine, over the rows of one layer's gradient; biases do not count."""
    if synthetic.ndim == 1:
        return synthetic.new_zeros(())
    a, b = synthetic.flatten(1), real.flatten(1)
    return (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)).sum()


def gradient_step(setting: Setting, network: ConvNet, optimizer: torch.optim.Optimizer) -> float:
    """One image step of gradient matching (DC, ICLR 2021; with augmentation DSA, ICML 2021)."""
    parameters = list(network.parameters())
    loss = torch.zeros((), device=setting.images.device)
    for c in range(len(setting.classes)):
        real, synthetic = setting.batches(c)
        target = torch.full((len(real),), c, device=real.device)
        real_gradients = torch.autograd.grad(F.cross_entropy(network(real), target), parameters)
        gradients = torch.autograd.grad(
            F.cross_entropy(network(synthetic), target[: len(synthetic)]), parameters, create_graph=True
        )
        for ours, theirs in zip(gradients, real_gradients, strict=True):
            loss = loss + layer_distance(ours, theirs.detach())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def train_epoch(
    setting: Setting, network: ConvNet, optimizer: torch.optim.Optimizer, batch: int = 256
) -> float:
    """One epoch on the synthetic images, as public code evaluates and takes inner steps; returns the loss."""
    loader = DataLoader(TensorDataset(setting.images.detach(), setting.labels), batch, shuffle=True)
    total = 0.0
    for images, labels in loader:
        logits = network(augmented(images, setting.part()))
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(labels)
    return total / len(setting.labels)


def evaluate(setting: Setting, test: tuple[Tensor, Tensor], networks: int, epochs: int) -> list[float]:
    """Train networks one after another (DSA's protocol) and test each once."""
    accuracies = []
    for _ in range(networks):
        network = setting.network()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs // 2 + 1])
        for _ in range(epochs):
            train_epoch(setting, network, optimizer)
            schedule.step()
        right = 0
        with torch.no_grad():
            for images, labels in DataLoader(TensorDataset(*test), 256):
                right += (network(images).argmax(1) == labels).sum().item()
        accuracies.append(right / len(test[1]))
    return accuracies


def trajectory_step(
    setting: Setting, start: Sequence[Tensor], target: Sequence[Tensor], steps: int, step_size: float
) -> Tensor:
    """One iteration of trajectory matching (MTT, CVPR 2022) on all images: the loss, its graph unrolled."""
    network = setting.network()
    names = [name for name, _ in network.named_parameters()]
    weights = [weight.clone().requires_grad_() for weight in start]
    for _ in range(steps):
        named = dict(zip(names, weights, strict=True))
        logits = torch.func.functional_call(network, named, (augmented(setting.images, setting.part()),))
        gradients = torch.autograd.grad(F.cross_entropy(logits, setting.labels), weights, create_graph=True)
        weights = [w - step_size * g for w, g in zip(weights, gradients, strict=True)]
    far = sum((w - t).square().sum() for w, t in zip(weights, target, strict=True))
    near = sum((w - t).square().sum() for w, t in zip(start, target, strict=True))
    return far / near
