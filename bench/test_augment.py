"""Augmentation: the compiled op beside the reference, the textbook version of each op, and kornia.

    python -m pytest bench/test_augment.py --benchmark-enable --benchmark-json=augment.json
    python -m bench.report augment.json

A case is one op at one size, forward or forward and backward, its versions measured in turn on the same
images, ten calls at a time, drawing of the parameters included. `copy` is the time to copy as many bytes:
forward reads and writes the images once, backward reads and writes the gradient once. On a GPU, where these
calls are shorter than Python takes to launch them, `recorded` is the same replayed as a CUDA graph, as the
loop has it, and `op` that without drawing.
"""

import functools
import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench import baselines, measure
from mim4dd import augment, extension, graph
from mim4dd.augment import strategy

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SHAPES = [(256, 3, 32, 32), (64, 3, 128, 128)]
GPU_SHAPES = [(2560, 3, 32, 32), (64, 3, 224, 224)] if torch.cuda.is_available() else []
OPS = [*augment.DSA.split("_"), "all"]
CALLS = 10
SECONDS = {"cpu": 5.0, "cuda": 0.5}  # for the rounds of a case, at least five of them


def strategy_of(op: str) -> str:
    return augment.DSA if op == "all" else op


def textbook(op: str, x: Tensor) -> Tensor:
    """The published version, with new numbers for every image; of all ops in the order of ours."""
    for part in ("color", "crop", "flip", "scale", "rotate", "cutout") if op == "all" else [op]:
        x = baselines.augmented(x, part)
    return x


def kornia_version(op: str, shape: tuple[int, ...]) -> Callable[[Tensor], Tensor] | None:
    kornia = importlib.import_module("kornia.augmentation")
    half = strategy.CUTOUT**2  # of the area
    makers = {
        "color": lambda: kornia.ColorJiggle(0.5, (0.5, 1.5), (0.0, 2.0), p=1.0),  # also clamps to [0, 1]
        "cutout": lambda: kornia.RandomErasing(scale=(half, half), ratio=(1.0, 1.0), p=1.0),
        "crop": lambda: kornia.RandomCrop(shape[2:], padding=int(shape[2] * strategy.CROP + 0.5)),
        "flip": lambda: kornia.RandomHorizontalFlip(p=0.5),
        "scale": lambda: kornia.RandomAffine(0, scale=(1 / 1.2, 1.2, 1 / 1.2, 1.2), p=1.0),
        "rotate": lambda: kornia.RandomRotation(strategy.ROTATE, p=1.0),
    }
    return makers[op]() if op in makers else None


def versions(
    op: str, shape: tuple[int, ...], generator: torch.Generator
) -> dict[str, Callable[[Tensor], Tensor]]:
    """What is timed, by name: images to augmented images."""

    def ours(backend: str, x: Tensor) -> Tensor:
        params = augment.sample(strategy_of(op), len(x), x.shape[2:], generator=generator, mode="all")
        return augment.apply(x, params, backend=backend)

    calls: dict[str, Callable[[Tensor], Tensor]] = {
        name: functools.partial(ours, name) for name in ("fused", "reference")
    }
    calls["textbook"] = functools.partial(textbook, op)
    if importlib.util.find_spec("kornia") and (transform := kornia_version(op, shape)):
        calls["kornia"] = transform
    return calls


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", GPU_SHAPES + SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("passes", ["both", "forward"])
@pytest.mark.parametrize("device", DEVICES)
def test_augment(benchmark, device, passes, shape, op):
    if benchmark.disabled:
        pytest.skip("nothing is timed; tests/ has the equality")
    if device == "cpu" and shape in GPU_SHAPES:
        pytest.skip("of a size for GPUs")
    if not extension.available(device):
        pytest.skip(f"the extension is not built for {device}")
    x = torch.randn(shape, device=device, requires_grad=passes == "both")
    upstream, copied = torch.randn(shape, device=device), torch.empty(shape, device=device)
    # One large block freed, as in any training: glibc then keeps memory instead of returning it each time.
    torch.empty(31 << 18)

    def step(function: Callable[[Tensor], Tensor]) -> None:
        y = function(x)
        if passes == "both":
            torch.autograd.grad(y, x, upstream)

    def copy() -> None:
        copied.copy_(x.detach())
        if passes == "both":
            copied.copy_(upstream)

    generator = torch.Generator(device).manual_seed(0)
    calls: dict[str, Callable[[], None]] = {
        name: functools.partial(step, function) for name, function in versions(op, shape, generator).items()
    }
    if device == "cuda":
        params = augment.sample(strategy_of(op), len(x), shape[2:], generator=generator, mode="all")
        alone = functools.partial(step, lambda x: augment.apply(x, params))
        calls["recorded"] = graph.replayed(calls["fused"], [generator], torch.device(device))
        calls["op"] = graph.replayed(alone, [], torch.device(device))
    calls["copy"] = graph.replayed(copy, [], torch.device(device))

    def several(call: Callable[[], None]) -> None:
        for _ in range(CALLS):
            call()

    repeated = {name: functools.partial(several, call) for name, call in calls.items()}
    # A first call of each is not timed: it finds in the caches what the one before it left there.
    rounds = measure.rounds_within(SECONDS[device], repeated, device)
    medians = measure.in_turn(benchmark, repeated, device, rounds, lambda name: calls[name]())
    benchmark.extra_info["seconds"] = {name: median / CALLS for name, median in medians.items()}
