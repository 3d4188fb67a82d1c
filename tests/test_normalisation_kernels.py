"""The kernels of normalisation against the formula in float64; without a GPU in Triton's interpreter."""

import numerics
import pytest
import torch
from numerics import close

pytest.importorskip("triton")

from mim4dd.kernels import normalisation

poisoned = numerics.poisoned  # a fixture
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
# Relative errors of maps by dtype: half precision is that of the same rounded maps, rounded.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def normalised(x, weight):
    """[B, C, H, W]; weight: [..., C]."""
    centred = x - x.mean((2, 3), keepdim=True)
    return centred * (centred.square().mean((2, 3), keepdim=True) + EPS).rsqrt() * weight[..., None, None]


def plain(x, weight, bias, relu, pool):
    out = normalised(x, weight) + bias[..., None, None]
    if relu:
        out = out.relu()
    height, width = (size // pool for size in x.shape[2:])
    out = out[:, :, : height * pool, : width * pool]
    return out.reshape(*x.shape[:2], height, pool, width, pool).mean((3, 5))


def parameters(x):
    """Weight and bias with which no value is so close to 0 that rounding decides about the ReLU."""
    channels = x.shape[1]
    weight, bias = random(channels, seed=1), random(channels, seed=2)
    values = normalised(x.double(), weight.double()).transpose(0, 1).flatten(1).sort(1).values
    quarter = values.shape[1] // 4
    if quarter:  # the middle of the widest gap where about half of the values are positive
        values = values[:, quarter : values.shape[1] - quarter]
        gaps, places = values.diff(dim=1).max(1)
        middle = -(values.gather(1, places[:, None])[:, 0] + gaps / 2).float()
        bias = torch.where(gaps > 1e-3, middle, bias)
    return weight, bias


def check(x, relu, pool, tolerance=1e-5):
    """Compare all three functions; `tolerance` is that of float32."""
    batch, channels, height, width = x.shape
    weight, bias = parameters(x)
    grad_out = random(batch, channels, height // pool, width // pool, dtype=x.dtype, seed=3)
    grad_grad_x = random(*x.shape, dtype=x.dtype, seed=4)
    grad_grad_weight, grad_grad_bias = random(batch, channels, seed=5), random(batch, channels, seed=6)
    # Gradients image by image are those of a weight and a bias for each image.
    x64, grad_out64 = x.double().requires_grad_(), grad_out.double().requires_grad_()
    weight64, bias64 = (value.double().repeat(batch, 1).requires_grad_() for value in (weight, bias))
    expected = plain(x64, weight64, bias64, relu, pool)
    first = torch.autograd.grad(expected, [x64, weight64, bias64], grad_out64, create_graph=True)
    grad_grads = grad_grad_x, grad_grad_weight, grad_grad_bias
    product = sum((a * b).sum() for a, b in zip(first, grad_grads, strict=True))
    second = torch.autograd.grad(product, [grad_out64, x64, weight64])
    rounded = max(tolerance, TOLERANCE[x.dtype])

    out, mean, rstd = normalisation.forward(x, weight, bias, EPS, relu, pool)
    close(out, expected, rounded)
    close(mean, x64.mean((2, 3)), tolerance)
    close(rstd, (x64.var((2, 3), correction=0) + EPS).rsqrt(), tolerance)
    largest = rstd.max()
    saved = x, weight, bias, mean, rstd
    grad_x, grad_weight, grad_bias = normalisation.backward(grad_out, *saved, relu, pool)
    close(grad_x, first[0], rounded, largest)
    close(grad_weight, first[1], tolerance, 1.0)
    close(grad_bias, first[2], tolerance)
    twice = normalisation.backward_twice(*grad_grads, grad_out, *saved, relu, pool)
    grad_grad_out, grad_x, grad_weight = twice
    close(grad_grad_out, second[0], rounded, largest)
    close(grad_x, second[1], rounded, largest)
    close(grad_weight, second[2], tolerance, largest)
    for value in (out, grad_x, grad_grad_out):
        assert value.dtype == x.dtype
        assert value.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 2), (5, 7), (8, 8), (16, 16), (33, 20)], ids=str)
def test_every_size_of_a_map(size, pool):
    check(random(2, 3, *size), True, pool)


@pytest.mark.parametrize("pool", [1, 2])
def test_without_the_relu(pool):
    check(random(2, 3, 5, 7), False, pool)


@pytest.mark.parametrize(
    ("channels", "size"), [(1, (5, 7)), (40, (10, 18)), (128, (4, 4)), (130, (4, 4)), (130, (5, 7))], ids=str
)
def test_every_number_of_channels(channels, size):
    check(random(2, channels, *size), True, 2)


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, pool):
    check(random(2, 48, 16, 16, dtype=dtype), True, pool)


@pytest.mark.parametrize("size", [(8, 8), (17, 33)], ids=str)
def test_channels_that_do_not_vary(size):
    x = random(2, 5, *size)
    x[0, 1], x[1, 2], x[:, 3] = 0, 2.5, -1e-3
    check(x, True, 2)


@pytest.mark.parametrize("size", [(16, 16), (20, 34)], ids=str)
def test_a_mean_far_larger_than_the_deviation(size):
    # The mean itself is rounded to 3e-5.
    check(1000 + random(2, 5, *size), True, 2, tolerance=1e-3)


def test_blocks_that_differ_in_mean():
    x = random(1, 20, 32, 20)  # of so many channels a block takes 64 of the 160 windows
    x[:, :, 16:] += 100
    check(x, False, 2)


def calls(x, grad_out, grad_grad_x, pool=2):
    """What all three functions return."""
    weight, bias = random(x.shape[1], seed=1), random(x.shape[1], seed=2)
    grad_grad_weight, grad_grad_bias = random(*x.shape[:2], seed=5), random(*x.shape[:2], seed=6)
    out, mean, rstd = normalisation.forward(x, weight, bias, EPS, True, pool)
    saved = x, weight, bias, mean, rstd, True, pool
    first = normalisation.backward(grad_out, *saved)
    second = normalisation.backward_twice(grad_grad_x, grad_grad_weight, grad_grad_bias, grad_out, *saved)
    return [out, mean, rstd, *first, *second]


def test_bits_do_not_depend_on_the_layout_of_the_maps_or_on_the_run():
    shape = 2, 20, 6, 4
    x, grad_grad_x = random(*shape), random(*shape, seed=4)
    grad_out = random(1, 20, 1, 2, seed=3).expand(2, 20, 3, 2)
    wider = [
        torch.stack([value, torch.full_like(value, torch.nan)], 4).flatten(3)[..., ::2]
        for value in (x, grad_grad_x)
    ]
    given = x, grad_out, grad_grad_x
    last = [value.contiguous(memory_format=torch.channels_last) for value in given]
    outcomes = [calls(*given), calls(wider[0], grad_out, wider[1]), calls(*last), calls(*last)]
    for values in zip(*outcomes, strict=True):
        assert values[0].isfinite().all()
        assert all(torch.equal(values[0], value) for value in values[1:])


def test_not_a_number_stays_in_its_channel():
    shape = 2, 3, 8, 8
    x, grad_out, grad_grad_x = random(*shape), random(2, 3, 4, 4, seed=3), random(*shape, seed=4)
    x[1, 2, 5, 5] = torch.nan
    for index, value in enumerate(calls(x, grad_out, grad_grad_x)):
        broken = value.isnan().reshape(2, 3, -1)
        # The gradient of the bias counts what passes the ReLU, as not-a-number does.
        assert broken[1, 2].all() or index == 5
        broken[1, 2] = False
        assert not broken.any()


def test_parameters_of_any_strides():
    """As `torch.vmap` makes them, repeated or from the midst of others."""
    x, grad_out = random(2, 6, 8, 8), random(2, 6, 4, 4, seed=3)
    weight, bias = random(12, seed=5)[::2], random(1, seed=6).expand(6)
    _, mean, rstd = normalisation.forward(x, weight, bias, EPS, True, 2)
    strided = mean.t().contiguous().t()
    found = [
        *normalisation.forward(x, weight, bias, EPS, True, 2),
        *normalisation.backward(grad_out, x, weight, bias, strided, rstd, True, 2),
        *normalisation.backward_twice(x, strided, mean, grad_out, x, weight, bias, mean, rstd, True, 2),
    ]
    weight, bias = weight.contiguous(), bias.contiguous()
    expected = [
        *normalisation.forward(x, weight, bias, EPS, True, 2),
        *normalisation.backward(grad_out, x, weight, bias, mean, rstd, True, 2),
        *normalisation.backward_twice(x, mean, mean, grad_out, x, weight, bias, mean, rstd, True, 2),
    ]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("pool", [1, 2])
def test_no_images(pool):
    x, grad_out = random(0, 6, 9, 8), random(0, 6, 9 // pool, 8 // pool)
    shapes = [value.shape for value in calls(x, grad_out, x, pool)]
    pooled, values = grad_out.shape, (0, 6)
    assert shapes == [pooled, values, values, x.shape, values, values, pooled, x.shape, values]
