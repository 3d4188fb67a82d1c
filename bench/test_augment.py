"""Augmentation: the compiled op beside the reference, the textbook version of each op, and kornia.

    python -m pytest bench/test_augment.py --benchmark-enable

Every table is one op at one size, forward or forward and backward, its rows measured in turn on the same
images. `copy` is the share of the speed at which the same bytes are copied: forward reads and writes the
images once, backward reads and writes the gradient once. On a GPU a call is timed with a synchronisation.
"""

import math

import pytest
import torch
import torch.nn.functional as F
import torch.utils.benchmark
from torch import Tensor

from mim4dd import augment

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SHAPES = [(256, 3, 32, 32), (64, 3, 128, 128)]
OPS = [*augment.DSA.split("_"), "all"]


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


def kornia_version(op: str, shape: tuple[int, ...]):
    kornia = pytest.importorskip("kornia", reason="kornia is not installed").augmentation
    makers = {
        "crop": lambda: kornia.RandomCrop(shape[2:], padding=int(shape[2] * augment.CROP + 0.5)),
        "flip": lambda: kornia.RandomHorizontalFlip(p=0.5),
        "scale": lambda: kornia.RandomAffine(0, scale=(1 / 1.2, 1.2, 1 / 1.2, 1.2), p=1.0),
        "rotate": lambda: kornia.RandomRotation(augment.ROTATE, p=1.0),
    }
    if op not in makers:
        pytest.skip(f"kornia has no {op} of this form")
    return makers[op]()


def version(name: str, op: str, shape: tuple[int, ...], device: str):
    """What is timed, drawing of the parameters included."""
    if name == "textbook":
        return TEXTBOOK[op]
    if name == "kornia":
        return kornia_version(op, shape)
    strategy = augment.DSA if op == "all" else op
    generator = torch.Generator(device).manual_seed(0)

    def ours(x: Tensor) -> Tensor:
        params = augment.sample(strategy, len(x), x.shape[2:], generator=generator, mode="all")
        return augment.apply(x, params, backend=name)

    return ours


def copy_seconds(x: Tensor, synchronise) -> float:
    timer, to = torch.utils.benchmark.Timer, torch.empty_like(x)
    return timer("to.copy_(x); synchronise()", globals=locals()).blocked_autorange(min_run_time=0.2).median


@pytest.mark.parametrize("name", ["fused", "reference", "textbook", "kornia"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("passes", ["forward", "both"])
@pytest.mark.parametrize("device", DEVICES)
def test_augment(benchmark, device, passes, shape, op, name):
    benchmark.group = f"{device} {passes} {'x'.join(map(str, shape))} {op}"
    x = torch.randn(shape, device=device, requires_grad=passes == "both")
    upstream = torch.randn(shape, device=device)
    # One large block freed, as in any training: glibc then keeps memory instead of returning it each time.
    torch.empty(31 << 18)
    function = version(name, op, shape, device)
    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None

    def call() -> None:
        y = function(x)
        if passes == "both":
            torch.autograd.grad(y, x, upstream)
        synchronise()

    benchmark.pedantic(call, rounds=15, warmup_rounds=2)
    if benchmark.stats is not None:
        copies = (2 if passes == "both" else 1) * copy_seconds(x.detach(), synchronise)
        benchmark.extra_info |= {
            "copy": round(copies / benchmark.stats.stats.median, 4),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        }
