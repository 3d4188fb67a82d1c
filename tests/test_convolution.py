"""The compiled convolution against torch's operator in float64."""

import pytest
import torch
import torch.nn.functional as F
from conftest import close, derivatives
from numerics import same_on_any_threads

from mim4dd import extension
from mim4dd.networks import convolution
from mim4dd.networks.convolution import conv2d
from mim4dd.seeding import generator

pytestmark = pytest.mark.skipif(not extension.available(), reason="the extension is not built")

# Batch, channels in and out, height, width: one pixel, sides with and without a rest of the tiles of 4,
# more tiles than a thread takes at once, and more than a block of the gradient by the weight.
SHAPES = [
    (1, 32, 64, 1, 1),
    (2, 64, 32, 5, 7),
    (3, 96, 32, 8, 4),
    (2, 32, 32, 3, 50),
    (9, 128, 128, 16, 16),
]


def case(shape):
    batch, channels, out, height, width = shape
    random = generator(0, "convolution")
    x = torch.randn(batch, channels, height, width, generator=random)
    weight = torch.randn(out, channels, 3, 3, generator=random)
    return [t.to(memory_format=torch.channels_last).requires_grad_() for t in (x, weight)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_forward_and_both_gradients(shape, layout):
    inputs = [t.detach().contiguous(memory_format=layout).requires_grad_() for t in case(shape)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    assert convolution._is_compiled(*inputs, (1, 1))
    ours = derivatives(lambda x, w: conv2d(x, w, (1, 1)), inputs, 2)
    plain = derivatives(lambda x, w: F.conv2d(x, w, padding=1), inputs, 2)
    expected = derivatives(lambda x, w: F.conv2d(x, w, padding=1), exact, 2)
    for actual, torchs, wanted in zip(ours, plain, expected, strict=True):
        assert actual.shape == wanted.shape
        scale = wanted.abs().max()
        error, theirs = ((t.double() - wanted).abs().max() / scale for t in (actual, torchs))
        assert error < 4 * theirs + 2e-6


def test_results_are_those_of_any_number_of_threads():
    inputs = case((9, 128, 128, 16, 16))
    same_on_any_threads(lambda: derivatives(lambda x, w: conv2d(x, w, (1, 1)), inputs, 2))


def test_no_image_has_a_gradient_of_zero():
    x, weight = case((0, 32, 64, 8, 8))
    out = conv2d(x, weight, (1, 1))
    assert out.shape == (0, 64, 8, 8)
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_an_image_does_not_depend_on_its_batch():
    x, weight = case((9, 64, 64, 7, 9))
    assert torch.equal(conv2d(x, weight, (1, 1))[4:5], conv2d(x[4:5], weight, (1, 1)))


@pytest.mark.parametrize(
    ("channels", "side", "padding", "dtype"),
    [
        (3, 3, 1, torch.float32),
        (32, 5, 2, torch.float32),
        (32, 3, 0, torch.float32),
        (32, 3, 1, torch.float64),
    ],
)
def test_what_is_not_compiled_is_torchs(channels, side, padding, dtype):
    random = generator(0, "convolution")
    x = torch.randn(2, channels, 8, 8, generator=random, dtype=dtype)
    weight = torch.randn(32, channels, side, side, generator=random, dtype=dtype)
    assert torch.equal(conv2d(x, weight, (padding, padding)), F.conv2d(x, weight, padding=padding))


def rounding(x, weight):
    with torch.autocast("cpu", torch.bfloat16):
        return conv2d(x, weight, (1, 1))


@pytest.mark.parametrize("shape", [*SHAPES[:4], (2, 3, 40, 8, 4), (1, 1, 1, 1, 1)], ids=str)
def test_autocast_and_both_gradients(shape):
    """Any number of channels, by torch's operator, but with these gradients of gradients."""
    inputs = [t.detach().bfloat16().float().requires_grad_() for t in case(shape)]
    out = rounding(*inputs)
    assert out.dtype == torch.bfloat16
    assert "_Convolve" in out.grad_fn.name()
    ours = derivatives(rounding, inputs, 2)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = derivatives(lambda x, w: F.conv2d(x, w, padding=1), exact, 2)
    for actual, wanted in zip(ours, expected, strict=True):
        close(actual.double(), wanted, 0.02)


@pytest.mark.parametrize("own_weights", [False, True])
def test_autocast_under_vmap(own_weights):
    x, weight = case((6, 32, 64, 5, 7))
    images = x.detach().unflatten(0, (3, 2))
    weights = torch.stack([weight.detach() * k for k in (1, 2, 3)]) if own_weights else weight.detach()

    def gradients(images, weight):
        return torch.func.grad(lambda *inputs: rounding(*inputs).float().square().sum(), (0, 1))(
            images, weight
        )

    batched = torch.func.vmap(gradients, in_dims=(0, 0 if own_weights else None))(images, weights)
    alone = [gradients(images[k], weights[k] if own_weights else weights) for k in range(3)]
    for together, each in zip(batched, zip(*alone, strict=True), strict=True):
        assert torch.equal(together, torch.stack(each))


def test_the_operators_keep_to_what_they_declare():
    inputs = [t.detach() for t in case((2, 32, 64, 5, 7))]
    for dtype in (torch.float32, torch.bfloat16):
        of_dtype = [t.to(dtype) for t in inputs]
        torch.library.opcheck(torch.ops.mim4dd.convolve, (*of_dtype, False))
        grad_y = torch.ops.mim4dd.convolve(*of_dtype, False)
        torch.library.opcheck(torch.ops.mim4dd.convolve, (grad_y, of_dtype[1], True))
        torch.library.opcheck(torch.ops.mim4dd.convolve_grad_weight, (grad_y, of_dtype[0]))


def test_wrong_channels_are_refused():
    x, weight = (t.detach() for t in case((2, 32, 64, 5, 7)))
    with pytest.raises(ValueError, match="multiples of 32"):
        torch.ops.mim4dd.convolve(x[:, :16], weight[:, :16], False)
    with pytest.raises(ValueError, match="must be float32"):
        torch.ops.mim4dd.convolve(x, weight, True)
