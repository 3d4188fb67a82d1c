"""The first block in one pass against torch's convolution and the plain normalisation, in float64."""

import resource
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import close, derivatives
from numerics import same_on_any_threads
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from mim4dd import extension, networks
from mim4dd.networks import ConvNet, normalisation
from mim4dd.networks.first_block import first_block, is_compiled
from mim4dd.seeding import generator

EPS = 1e-5
pytestmark = pytest.mark.skipif(not extension.available(), reason="the extension is not built")

# Batch, channels in and out, height, width, padding: the padded digits, colours, sides with a rest of every
# kind, two rows, as many channels as there may be.
SHAPES = [
    (2, 1, 32, 28, 28, 3),
    (3, 3, 64, 16, 16, 1),
    (2, 2, 96, 11, 13, 0),
    (1, 4, 128, 2, 9, 1),
]


def case(shape):
    batch, channels, out, height, width, _ = shape
    random = generator(0, "block")
    sizes = (batch, channels, height, width), (out, channels, 3, 3), (out,), (out,)
    x, weight, scale, bias = (torch.randn(size, generator=random) for size in sizes)
    return [t.requires_grad_() for t in (x, weight, scale, bias)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("pool", [1, 2])
def test_forward_and_both_gradients(shape, relu, pool):
    inputs, padding = case(shape), shape[-1]
    if relu:
        # All open or all shut, channel by channel: roundings may open one that is shut in float64.
        with torch.no_grad():
            inputs[3].copy_(30 * inputs[3].sign())
    assert is_compiled(*inputs[:2], (padding, padding))

    def plain(x, weight, scale, bias):
        convolved = F.conv2d(x, weight, padding=padding)
        return normalisation.reference(convolved, scale, bias, EPS, relu, pool)

    ours = derivatives(
        lambda *tensors: first_block(*tensors, EPS, padding=padding, relu=relu, pool=pool), inputs, 3
    )
    expected = derivatives(plain, [t.detach().double().requires_grad_() for t in inputs], 3)
    for actual, wanted in zip(ours, expected, strict=True):
        assert actual.shape == wanted.shape
        if wanted.numel():
            assert (actual - wanted).abs().max() <= 1e-5 * wanted.abs().max() + 1e-5


def test_shut_rectifiers_let_nothing_through():
    """As torch's, in the same float32: which is open is decided by the block's own numbers."""
    inputs = case((2, 1, 32, 28, 28, 3))
    out = first_block(*inputs, EPS, padding=3, relu=True, pool=1)
    expected = normalisation.reference(
        F.conv2d(inputs[0], inputs[1], padding=3), *inputs[2:], EPS, relu=True, pool=1
    )
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    x, weight, scale, bias = inputs
    upstream = torch.randn(out.shape, generator=generator(0, "up"))
    ours = torch.autograd.grad(out, inputs, upstream)
    open_ = first_block(x, weight, scale, bias, EPS, padding=3, relu=False, pool=1)
    theirs = torch.autograd.grad(open_, inputs, upstream * (out > 0))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_autocast_rounds_the_maps_and_nothing_else(shape):
    inputs, padding = case(shape), shape[-1]
    with torch.no_grad():
        inputs[0].copy_(inputs[0].bfloat16())

    def block(*tensors):
        return first_block(*tensors, EPS, padding=padding, relu=True, pool=2)

    def rounding(*tensors):
        with torch.autocast("cpu", torch.bfloat16):
            assert is_compiled(*tensors[:2], (padding, padding))
            return block(*tensors)

    out, half = block(*inputs), rounding(*inputs)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, out.bfloat16())
    upstream = torch.randn(out.shape, generator=generator(0, "up")).bfloat16()
    of_images, *of_weights = torch.autograd.grad(half, inputs, upstream)
    plain = torch.autograd.grad(out, inputs, upstream.float())
    assert torch.equal(of_images, plain[0].bfloat16().float())
    for actual, expected in zip(of_weights, plain[1:], strict=True):
        assert torch.equal(actual, expected)
    for actual, expected in zip(
        derivatives(rounding, inputs, 3), derivatives(lambda *t: block(*t).bfloat16(), inputs, 3), strict=True
    ):
        close(actual.float(), expected.float(), 0.02)


def test_autocast_to_float16_is_torchs():
    x, weight, *_ = case(SHAPES[0])
    with torch.autocast("cpu", torch.float16):
        assert not is_compiled(x, weight, (3, 3))


def test_gradients_that_nobody_wants_are_left_out():
    x, weight, scale, bias = case((2, 1, 32, 28, 28, 3))
    alone = [t.detach() for t in (x, weight, scale, bias)]
    for k in range(2):
        inputs = [*alone]
        inputs[k] = (x, weight)[k]
        options = {"padding": 3, "relu": True, "pool": 2}
        everything = first_block(x, weight, scale, bias, EPS, **options).square().sum()
        (expected,) = torch.autograd.grad(everything, [inputs[k]])
        one = first_block(*inputs, EPS, **options).square().sum()
        (found,) = torch.autograd.grad(one, [inputs[k]])
        assert torch.equal(found, expected)


def test_a_gradient_that_nobody_used_is_one_of_zeros():
    """In the derivatives of the gradients: empty is zero, only faster."""
    x, weight, scale, bias = (t.detach() for t in case((2, 3, 64, 16, 16, 1)))
    tensors = x, weight.flatten(1).t().contiguous(), scale, bias
    y, *moments = torch.ops.mim4dd.first_block(*tensors, EPS, 1, True, 2)
    grad_grad_others = [torch.randn_like(t) for t in tensors[1:]]
    without, with_zeros = (
        torch.ops.mim4dd.first_block_backward_twice(
            grad_grad_x, *grad_grad_others, y, *tensors, *moments, 1, True, 2
        )
        for grad_grad_x in (x.new_empty(0), torch.zeros_like(x))
    )
    for ours, theirs in zip(without, with_zeros, strict=True):
        close(ours, theirs, 1e-5)


class Operators(TorchDispatchMode):
    """Notes what is called."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.append((func.name(), args))
        return func(*args, **(kwargs or {}))


def test_gradients_by_the_weights_are_differentiable_by_the_images():
    """Batched by vmap or not, and without the gradient by the images, which nobody asked for."""
    _, weight, scale, bias = (t.detach() for t in case((1, 1, 32, 8, 8, 1)))
    images = torch.randn(3, 2, 1, 8, 8, requires_grad=True, generator=generator(0, "images"))
    upstream = torch.randn(3, *weight.shape, generator=generator(0, "up"))

    def loss(weight, images):
        return first_block(images, weight, scale, bias, EPS, padding=1, relu=True, pool=2).square().sum()

    with Operators() as operators:
        batched = vmap(grad(loss), (None, 0))(weight, images)
    (backward,) = (inputs for name, inputs in operators.called if name == "mim4dd::first_block_backward")
    assert backward[-2:] == (False, True), "by the images it is not worked out"
    (found,) = torch.autograd.grad(batched, images, upstream)
    leaf = weight.clone().requires_grad_()
    alone = [torch.autograd.grad(loss(leaf, own), leaf, create_graph=True)[0] for own in images]
    (expected,) = torch.autograd.grad(torch.stack(alone), images, upstream)
    close(batched, torch.stack(alone), 1e-5)
    close(found, expected, 1e-5)


def test_results_are_those_of_any_number_of_threads():
    inputs = case((5, 3, 64, 16, 16, 1))

    def block(*tensors):
        return first_block(*tensors, EPS, padding=1, relu=True, pool=2)

    same_on_any_threads(lambda: derivatives(block, inputs, 3))


def test_the_network_takes_it_but_in_float64():
    network, images = ConvNet(1, 10, image_size=(28, 28), width=32), torch.randn(2, 1, 28, 28)
    assert "FirstBlock" in network.blocks[0](images).grad_fn.name()
    with torch.autocast("cpu", torch.bfloat16):
        assert "FirstBlock" in network.blocks[0](images).grad_fn.name()
    assert "FirstBlock" not in network.double().blocks[0](images.double()).grad_fn.name()


def test_the_operators_keep_to_what_they_declare():
    x, weight, scale, bias = (t.detach() for t in case((2, 3, 64, 16, 16, 1)))
    tensors = x, weight.flatten(1).t().contiguous(), scale, bias
    for images in (x.bfloat16(), x):
        torch.library.opcheck(torch.ops.mim4dd.first_block, (images, *tensors[1:], EPS, 1, True, 2))
    y, mean, rstd = torch.ops.mim4dd.first_block(*tensors, EPS, 1, True, 2)
    for wanted in (True, False):
        torch.library.opcheck(
            torch.ops.mim4dd.first_block_backward, (y, *tensors, mean, rstd, 1, True, 2, wanted, wanted)
        )
    torch.library.opcheck(
        torch.ops.mim4dd.first_block_backward_twice, (*tensors, y, *tensors, mean, rstd, 1, True, 2)
    )


def test_what_does_not_fit_is_refused():
    x, weight, scale, bias = (t.detach() for t in case((2, 3, 64, 16, 16, 1)))
    taps = weight.flatten(1).t().contiguous()
    block = torch.ops.mim4dd.first_block
    for wrong, message in (
        ((x[:, :2], taps, scale, bias), "the channels that the weight is for"),
        ((x, taps[:, :40], scale[:40], bias[:40]), "multiple of 32"),
        ((x[..., :6], taps, scale, bias), "at least 8 pixels"),
        ((x, taps, scale[:32], bias), "the shape that belongs"),
        ((x.double(), taps, scale, bias), "must be float32 or bfloat16"),
        ((x, taps.bfloat16(), scale, bias), "all else float32"),
    ):
        with pytest.raises(ValueError, match=message):
            block(*wrong, EPS, 1, True, 2)
    for padding in (-1, 2**62, 2**63 - 1):  # twice the last is -2
        with pytest.raises(ValueError, match="padding must be from 0 to"):
            block(x, taps, scale, bias, EPS, padding, True, 2)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_what_a_large_image_takes_is_given_back():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def block(side):
        y, *_ = torch.ops.mim4dd.first_block(torch.ones(1, 1, side, side), *weights, EPS, 1, True, 2)
        return y.numel()

    weights = torch.ones(9, 32), torch.ones(32), torch.ones(32)
    block(64)
    before = resident()
    block(600)  # works in 286 MiB
    assert resident() - before < 64 * 2**20


@pytest.mark.parametrize(("channels", "size"), [(5, (8, 8)), (3, (8, 7)), (3, (6, 6)), (1, (8, 4))])
def test_images_the_block_is_not_made_for_take_the_plain_way(channels, size):
    network = ConvNet(channels, 10, width=32, depth=2, image_size=size)
    networks.initialise(network, generator(0, "w"))
    x = torch.randn(2, channels, *size, generator=generator(0, "x"))
    close(network(x), network.double()(x.double()))
