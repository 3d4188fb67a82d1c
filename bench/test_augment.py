"""Augmentation: the compiled op beside the reference, the textbook version of each op, and kornia.

    python -m pytest bench/test_augment.py --benchmark-enable

A case is one op at one size, forward or forward and backward, its versions measured in turn on the same
images. `copy` is the time in which the same bytes are copied: forward reads and writes the images once,
backward reads and writes the gradient once. On a GPU a call is timed with a synchronisation.
"""

import functools
import importlib.util
import math
import statistics
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mim4dd import augment

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SHAPES = [(256, 3, 32, 32), (64, 3, 128, 128)]
OPS = [*augment.DSA.split("_"), "all"]
ROUNDS, WARMUP = 30, 3


def uniform(x: Tensor) -> Tensor:
    return torch.rand(len(x), 1, 1, 1, device=x.device)


def color(x: Tensor) -> Tensor:
    x = x + (uniform(x) - 0.5)
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (uniform(x) * 2) + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (uniform(x) + 0.5) + mean


def grid(x: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
    ranges = [torch.arange(n, device=x.device) for n in (len(x), height, width)]
    return torch.meshgrid(*ranges, indexing="ij")


def crop(x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    image, row, column = grid(x, height, width)
    reach = int(height * augment.CROP + 0.5)
    shift = torch.randint(-reach, reach + 1, (2, len(x), 1, 1), device=x.device)
    row = (row + shift[0] + 1).clamp(0, height + 1)
    column = (column + shift[1] + 1).clamp(0, width + 1)
    padded = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1).contiguous()
    return padded[image, row, column].permute(0, 3, 1, 2).contiguous()


def cutout(x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    box = int(height * augment.CUTOUT + 0.5)
    image, row, column = grid(x, box, box)
    corner = torch.randint(0, height + 1 - box % 2, (2, len(x), 1, 1), device=x.device) - box // 2
    mask = torch.ones(len(x), height, width, device=x.device)
    mask[image, (row + corner[0]).clamp(0, height - 1), (column + corner[1]).clamp(0, width - 1)] = 0
    return x * mask[:, None]


def flip(x: Tensor) -> Tensor:
    return torch.where(uniform(x) < 0.5, x.flip(3), x)


def warp(x: Tensor, matrix: Tensor) -> Tensor:
    theta = F.pad(matrix, (0, 1))
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=True), align_corners=True)


def scale(x: Tensor) -> Tensor:
    factors = torch.rand(len(x), 2, device=x.device) * (augment.SCALE - 1 / augment.SCALE) + 1 / augment.SCALE
    return warp(x, torch.diag_embed(factors))


def rotate(x: Tensor) -> Tensor:
    angle = (torch.rand(len(x), device=x.device) * 2 - 1) * augment.ROTATE * math.pi / 180
    rows = [torch.stack([angle.cos(), -angle.sin()], 1), torch.stack([angle.sin(), angle.cos()], 1)]
    return warp(x, torch.stack(rows, 1))


def every(x: Tensor) -> Tensor:
    for op in (color, crop, flip, scale, rotate, cutout):
        x = op(x)
    return x


TEXTBOOK = {
    "color": color,
    "crop": crop,
    "cutout": cutout,
    "flip": flip,
    "scale": scale,
    "rotate": rotate,
    "all": every,
}


def kornia_version(op: str, shape: tuple[int, ...]) -> Callable[[Tensor], Tensor] | None:
    kornia = importlib.import_module("kornia.augmentation")
    makers = {
        "crop": lambda: kornia.RandomCrop(shape[2:], padding=int(shape[2] * augment.CROP + 0.5)),
        "flip": lambda: kornia.RandomHorizontalFlip(p=0.5),
        "scale": lambda: kornia.RandomAffine(0, scale=(1 / 1.2, 1.2, 1 / 1.2, 1.2), p=1.0),
        "rotate": lambda: kornia.RandomRotation(augment.ROTATE, p=1.0),
    }
    return makers[op]() if op in makers else None


def versions(op: str, shape: tuple[int, ...], device: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """What is timed, drawing of the parameters included."""
    strategy = augment.DSA if op == "all" else op
    generator = torch.Generator(device).manual_seed(0)

    def ours(backend: str, x: Tensor) -> Tensor:
        params = augment.sample(strategy, len(x), x.shape[2:], generator=generator, mode="all")
        return augment.apply(x, params, backend=backend)

    calls: dict[str, Callable[[Tensor], Tensor]] = {
        name: functools.partial(ours, name) for name in ("fused", "reference")
    }
    calls["textbook"] = TEXTBOOK[op]
    if importlib.util.find_spec("kornia") and (transform := kornia_version(op, shape)):
        calls["kornia"] = transform
    return calls


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("passes", ["forward", "both"])
@pytest.mark.parametrize("device", DEVICES)
def test_augment(benchmark, device, passes, shape, op):
    """A round times every version once, so that whatever else the machine does slows all of them.

    Each has just been called: what is timed is its own work, not what the one before left in the caches.
    """
    x = torch.randn(shape, device=device, requires_grad=passes == "both")
    upstream, copied = torch.randn(shape, device=device), torch.empty(shape, device=device)
    # One large block freed, as in any training: glibc then keeps memory instead of returning it each time.
    torch.empty(31 << 18)
    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None

    def gradient(y: Tensor) -> None:
        if passes == "both":
            torch.autograd.grad(y, x, upstream)

    def copy() -> None:
        copied.copy_(x.detach())
        if passes == "both":
            copied.copy_(upstream)

    calls: dict[str, Callable[[], object]] = {
        name: lambda function=function: gradient(function(x))
        for name, function in versions(op, shape, device).items()
    }
    calls["copy"] = copy
    seconds: dict[str, list[float]] = {name: [] for name in calls}

    def measure() -> None:
        for name, call in calls.items():
            call()
            synchronise()
            began = time.perf_counter()
            call()
            synchronise()
            seconds[name].append(time.perf_counter() - began)

    benchmark.pedantic(measure, rounds=ROUNDS, warmup_rounds=WARMUP)
    benchmark.extra_info |= {
        "seconds": {name: statistics.median(times[-ROUNDS:]) for name, times in seconds.items()},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
