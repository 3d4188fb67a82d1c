"""The compiled augmentation on a GPU, beside the reference on the CPU; it needs torch and pytest only."""

import dataclasses

import pytest
import torch
from numerics import IMAGE_TOLERANCE, close_images

from bench import measure
from mim4dd import augment, extension

DEVICE = "cuda"
PARTS = augment.DSA.split("_")
SHAPES = [(0, 3, 8, 8), (5, 1, 1, 1), (5, 3, 32, 32), (3, 7, 65, 33), (2, 3, 224, 224)]

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and extension.available("cuda")),
    reason="no CUDA device, or the extension is not built for CUDA",
)


def drawn(strategy: str, rows: int, size: tuple[int, int]) -> tuple[augment.AugmentParams, ...]:
    """The same parameters on the CPU and on the GPU."""
    params = augment.sample(strategy, rows, size, generator=torch.Generator().manual_seed(0), mode="all")
    return params, params.to(DEVICE)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", IMAGE_TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("strategy", [*PARTS, augment.DSA])
def test_images_and_gradients_equal_the_reference(strategy, shape, dtype, memory_format):
    x, upstream = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    results = []
    for device, params in zip(("cpu", DEVICE), drawn(strategy, shape[0], shape[2:]), strict=True):
        leaf = x.to(device).to(memory_format=memory_format).requires_grad_()
        y = augment.apply(leaf, params, backend="reference" if device == "cpu" else "fused")
        results.append((y.detach(), *torch.autograd.grad(y, leaf, upstream.to(device))))
    for expected, result in zip(*results, strict=True):
        close_images(result, expected)


@pytest.mark.parametrize("strategy", ["crop", "color", augment.DSA])
def test_a_small_image_takes_one_launch_each_way(strategy):
    x = torch.randn(256, 3, 32, 32, device=DEVICE, requires_grad=True)
    _, params = drawn(strategy, 256, (32, 32))
    upstream = torch.randn_like(x)

    def step() -> None:
        torch.autograd.grad(augment.apply(x, params, backend="fused"), x, upstream)

    step()
    count = measure.launches(step)
    assert count in (None, 2), "None: the profiler sees nothing here"


def test_drawing_takes_two_launches():
    random = torch.Generator(DEVICE).manual_seed(0)

    def step() -> None:
        augment.sample(augment.DSA, 256, 32, generator=random, mode="each")

    step()
    assert measure.launches(step) in (None, 2), "None: the profiler sees nothing here"


def test_bytes_rows_and_both_conventions_of_corners():
    x = torch.randint(0, 256, (6, 3, 9, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    on_cpu, on_gpu = drawn(augment.DSA, 2, (9, 12))
    rows, mean, std = torch.tensor([0, 1, 1, 0, 0, 1]), torch.full((3,), 0.5), torch.tensor([0.2, 0.3, 0.4])
    for align_corners in (True, False):
        expected = augment.apply(
            x, on_cpu, rows=rows, mean=mean, std=std, align_corners=align_corners, backend="reference"
        )
        moved = {"rows": rows.to(DEVICE), "mean": mean.to(DEVICE), "std": std.to(DEVICE)}
        result = augment.apply(x.to(DEVICE), on_gpu, **moved, align_corners=align_corners, backend="fused")
        close_images(result, expected)


def test_gradients_once_and_twice():
    _, params = drawn(augment.DSA, 2, (3, 4))
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: augment.apply(x, params), x)
    assert torch.autograd.gradgradcheck(lambda x: augment.apply(x, params) ** 2, x)


def test_two_runs_give_the_same_bits():
    _, params = drawn(augment.DSA, 64, (32, 32))
    x = torch.randn(64, 3, 32, 32, device=DEVICE, requires_grad=True)
    runs = []
    for _ in range(2):
        y = augment.apply(x, params)
        runs.append((y, *torch.autograd.grad(y.square().sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_what_is_not_finite_or_out_of_range_makes_one_image_nan():
    _, params = drawn("color", 3, (8, 8))
    broken = dataclasses.replace(params, contrast=torch.tensor([1.0, torch.nan, 1.0], device=DEVICE))
    y = augment.apply(torch.ones(3, 1, 8, 8, device=DEVICE), broken)
    assert y.isnan().flatten(1).all(1).tolist() == [False, True, False]
    y = augment.apply(torch.ones(2, 1, 8, 8, device=DEVICE), params, rows=torch.tensor([2, 3], device=DEVICE))
    assert y.isnan().flatten(1).all(1).tolist() == [False, True]


def test_a_graph_captures_it():
    _, params = drawn(augment.DSA, 16, (32, 32))
    x = torch.randn(16, 3, 32, 32, device=DEVICE)
    augment.apply(x, params)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = augment.apply(x, params)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, augment.apply(x, params))
