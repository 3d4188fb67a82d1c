"""The kernels of the first block against torch's layers in float64; without a GPU in Triton's interpreter."""

import numerics
import pytest
import torch
import torch.nn.functional as F
from numerics import close

pytest.importorskip("triton")

from mim4dd.kernels import first_block, launch

exact, poisoned = numerics.exact, numerics.poisoned  # fixtures
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
# Relative errors by dtype; half precision against the formula on the same rounded operands.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
# Batch, groups, input channels of a group, height, width, padding, output channels: no multiple of any block,
# whole windows only, the padded digits, a single row, and as many input channels as there may be.
SHAPES = [
    (2, 3, 1, 5, 7, 1, 48),
    (3, 1, 3, 8, 8, 1, 128),
    (1, 1, 1, 28, 28, 3, 32),
    (2, 1, 4, 3, 9, 0, 16),
    (2, 3, 4, 4, 5, 2, 96),
    (1, 2, 2, 9, 6, 1, 64),
]


def case(shape, dtype=torch.float32):
    """x, a weight whose numbers `dtype` holds, scale, bias and padding."""
    batch, groups, channels, height, width, padding, out = shape
    g = torch.Generator().manual_seed(0)
    sizes = (batch, groups * channels, height, width), (out, channels, 3, 3), (out,), (out,)
    x, weight, scale, bias = (torch.randn(size, generator=g).to(DEVICE) for size in sizes)
    return x.to(dtype), weight.to(dtype).float(), scale, bias, padding


def plain(x, weight, scale, bias, padding, relu, pool):
    """The block's output and the convolution's, in float64."""
    convolved = F.conv2d(x.double(), weight, padding=padding, groups=x.shape[1] // weight.shape[1])
    out = F.group_norm(convolved, len(weight), scale, bias, EPS)
    out = out.relu() if relu else out
    if pool == 2:  # `avg_pool2d` refuses a single row
        down, across = out.shape[2] // 2, out.shape[3] // 2
        out = (
            out[:, :, : 2 * down, : 2 * across].unflatten(3, (across, 2)).unflatten(2, (down, 2)).mean((3, 5))
        )
    return out, convolved


def check(x, weight, scale, bias, padding, relu, pool, tolerance=None, loose=None):
    """Both functions; `loose` is the tolerance of the gradients if it is another."""
    tolerance = tolerance or TOLERANCE[x.dtype]
    loose = loose or tolerance
    taps = weight.flatten(1).t()
    out, mean, rstd = first_block.forward(x, taps, scale, bias, EPS, padding, relu, pool)
    leaves = [value.double().requires_grad_() for value in (weight, scale, bias)]
    expected, convolved = plain(x, *leaves, padding, relu, pool)
    assert out.dtype == x.dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    close(out, expected.detach(), tolerance)
    # The statistics are those of rounded operands, in float32.
    variance, expected_mean = torch.var_mean(convolved.detach(), (2, 3), correction=0)
    exact = min(tolerance, 1e-3)
    close(mean, expected_mean, exact)
    close(rstd, (variance + EPS).rsqrt(), exact)

    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    grad_taps, grad_scale, grad_bias = first_block.backward(
        grad_out, x, taps, scale, bias, mean, rstd, padding, relu, pool
    )
    assert grad_taps.shape == (len(x), *taps.shape)
    assert grad_scale.shape == grad_bias.shape == (len(x), len(scale))
    assert grad_taps.dtype == grad_scale.dtype == grad_bias.dtype == torch.float32
    wanted = torch.autograd.grad(expected, leaves, grad_out.double())
    close(grad_taps.sum(0).t().reshape(weight.shape), wanted[0], loose)
    close(grad_scale.sum(0), wanted[1], loose)
    close(grad_bias.sum(0), wanted[2], loose)
    return out, mean, rstd, grad_taps, grad_scale, grad_bias


def open_or_shut(bias):
    """All of a channel: roundings may open a pixel that is shut in float64."""
    return 30 * bias.sign()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("pool", [1, 2])
def test_forward_and_gradients(shape, relu, pool):
    x, weight, scale, bias, padding = case(shape)
    # A bias of 30 leaves the roundings of 30 to the normalised channel.
    tolerance = {"tolerance": 2e-5, "loose": 5e-5} if relu else {}
    check(x, weight, scale, open_or_shut(bias) if relu else bias, padding, relu, pool, **tolerance)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[4]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(shape, dtype):
    x, weight, scale, bias, padding = case(shape, dtype)
    check(x, weight, scale, bias, padding, relu=False, pool=2)
    check(x, weight, scale, open_or_shut(bias), padding, relu=True, pool=1)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[5]], ids=str)
def test_tensor_float(shape, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    x, weight, scale, bias, padding = case(shape)
    check(x, weight, scale, bias, padding, relu=False, pool=2, tolerance=5e-3, loose=1e-2)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("pool", [1, 2])
def test_rectifiers_open_here_and_shut_there(pool, dtype):
    # One that is within rounding of 0 may be on the other side.
    check(*case((2, 1, 3, 9, 9, 1, 64), dtype), relu=True, pool=pool, loose=3e-2)


def test_shut_rectifiers_let_nothing_through():
    """What is shut is decided by the block's own numbers, and is exactly 0."""
    x, weight, scale, bias, padding = case(SHAPES[1])
    scale[:8], bias[:4] = 0, 0  # an input of exactly 0 is shut
    taps = weight.flatten(1).t()
    out, *saved = first_block.forward(x, taps, scale, bias, EPS, padding, True, 1)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    ours = first_block.backward(grad_out, x, taps, scale, bias, *saved, padding, True, 1)
    theirs = first_block.backward(grad_out * (out > 0), x, taps, scale, bias, *saved, padding, False, 1)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not ours[2][:, :4].any()


def test_images_far_from_zero_or_without_contrast():
    x, weight, scale, bias, _ = case((2, 1, 3, 10, 9, 0, 32))
    check(x + 50, weight, scale, bias, 0, relu=False, pool=2, tolerance=2e-4, loose=2e-3)
    flat = torch.ones_like(x)
    out, _, rstd = first_block.forward(flat, weight.flatten(1).t(), scale, bias, EPS, 0, False, 1)
    close(rstd, torch.full_like(rstd, EPS**-0.5).double(), 2e-2)
    close(out, bias.double()[:, None, None].expand(out.shape), 2e-3)


def test_views_of_any_strides():
    shape = batch, groups, _, height, width, padding, _ = SHAPES[0]
    x, weight, scale, bias, _ = case(shape)
    expected = check(x, weight, scale, bias, padding, relu=False, pool=2)
    many = torch.zeros(groups, batch, 2, height + 2, 3 * width, device=DEVICE)
    flattened = many[:, :, 1, 1:-1, 1::3].movedim(0, 1)
    flattened.copy_(x)
    assert flattened.stride() == (
        2 * (height + 2) * 3 * width,
        batch * 2 * (height + 2) * 3 * width,
        3 * width,
        3,
    )
    one = torch.randn(1, *x.shape[2:], generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for view in (
        flattened,
        x.contiguous(memory_format=torch.channels_last),
        x.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0),
    ):
        assert not view.is_contiguous()
        actual = check(view, weight, scale, bias, padding, relu=False, pool=2)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    check(one.expand(x.shape), weight, scale, bias, padding, relu=False, pool=2)
    doubled = weight.repeat_interleave(2, 0)[::2], scale.repeat_interleave(2)[::2]
    actual = check(x, *doubled, bias, padding, relu=False, pool=2)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_gradients_of_any_strides():
    x, weight, scale, bias, padding = case(SHAPES[5])
    taps = weight.flatten(1).t().contiguous()
    out, *saved = first_block.forward(x, taps, scale, bias, EPS, padding, True, 2)
    for grad_out in (torch.ones_like(out).contiguous(), torch.ones((), device=DEVICE).expand(out.shape)):
        actual = first_block.backward(grad_out, x, taps, scale, bias, *saved, padding, True, 2)
        expected = first_block.backward(torch.ones_like(out), x, taps, scale, bias, *saved, padding, True, 2)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_not_a_number_stays_in_its_image_and_channel():
    x, weight, scale, bias, padding = case((2, 1, 1, 8, 8, 1, 16))
    x[1, 0, 3, 3] = torch.nan
    bias[5] = torch.nan
    taps = weight.flatten(1).t()
    for relu in (False, True):
        out, mean, rstd = first_block.forward(x, taps, scale, bias, EPS, padding, relu, 2)
        assert out[1].isnan().all()
        assert mean[1].isnan().all()
        assert rstd[1].isnan().all()
        broken = out[0].flatten(1).isnan()
        assert broken[5].all()
        broken[5] = False
        assert not broken.any()


def test_no_images():
    x, weight, scale, bias, padding = case((0, 1, 1, 8, 8, 1, 32))
    taps = weight.flatten(1).t()
    out, *saved = first_block.forward(x, taps, scale, bias, EPS, padding, True, 2)
    assert out.shape == (0, 32, 4, 4)
    grad_taps, grad_scale, grad_bias = first_block.backward(
        out, x, taps, scale, bias, *saved, padding, True, 2
    )
    assert grad_taps.shape == (0, 9, 32)
    assert grad_scale.shape == grad_bias.shape == (0, 32)


def test_runs_are_identical():
    arguments = case(SHAPES[1], torch.bfloat16)
    first, second = (check(*arguments, relu=True, pool=2, loose=3e-2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_products_are_as_precise_as_torchs_convolutions(monkeypatch):
    for allowed, precision in ((True, "tf32"), (False, "ieee")):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        assert launch.precision_of_convolutions(torch.float32) == precision
    assert launch.precision_of_convolutions(torch.bfloat16) == "half"
