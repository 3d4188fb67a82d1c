"""The compiled normalisation against torch's operators."""

import pytest
import torch
from conftest import close, derivatives

from mim4dd import extension
from mim4dd.networks import ConvNet
from mim4dd.networks.normalisation import instance_norm, reference
from mim4dd.seeding import generator

EPS = 1e-5
pytestmark = pytest.mark.skipif(not extension.available(), reason="the extension is not built")

# Channels: one, a part of a vector, several vectors and a rest. Sides: even, odd, larger than the pooling.
SHAPES = [(2, 3, 4, 4), (1, 9, 5, 7), (2, 70, 3, 2), (2, 1, 4, 5), (2, 40, 2, 2), (3, 128, 6, 6)]


def case(shape, dtype=torch.float64):
    random = generator(0, "norm")
    x = torch.randn(shape, generator=random, dtype=torch.float64) + 3
    weight, bias = (torch.randn(shape[1], generator=random, dtype=torch.float64) for _ in range(2))
    return x.to(dtype), weight, bias


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("pool", [1, 2])
def test_forward_and_both_gradients(shape, relu, pool):
    inputs = [t.requires_grad_() for t in case(shape)]

    ours = derivatives(lambda x, w, b: instance_norm(x, w, b, EPS, relu=relu, pool=pool), inputs, 2)
    expected = derivatives(lambda x, w, b: reference(x, w, b, EPS, relu, pool), inputs, 2)
    for actual, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_gradients_are_those_of_finite_differences():
    inputs = [t.requires_grad_() for t in case((2, 3, 5, 4))]

    def function(x, w, b):
        return instance_norm(x, w, b, EPS, relu=True, pool=2)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 130, 33, 31)], ids=str)
def test_short_dtypes_round_once(shape, dtype, tolerance):
    x, weight, bias = case(shape, dtype)
    x.requires_grad_()
    out = instance_norm(x, weight.float(), bias.float(), EPS, relu=True, pool=2)
    assert out.dtype == dtype
    upstream = torch.randn(out.shape, generator=generator(0, "up"), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(out, x, upstream.to(dtype))
    exact = x.detach().double().requires_grad_()
    expected = reference(exact, weight, bias, EPS, True, 2)
    close(out, expected, tolerance)
    close(gradient, torch.autograd.grad(expected, exact, upstream.to(dtype).double())[0], tolerance)


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "sliced", "expanded"])
def test_any_layout(layout):
    x, weight, bias = case((4, 6, 8, 8), torch.float32)
    x = {
        "contiguous": x,
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "sliced": x[::2, :, 1:, ::2],
        "expanded": x[:1].expand(3, -1, -1, -1),
    }[layout]
    weight, bias = weight.float(), bias.float()
    close(instance_norm(x, weight, bias, EPS, pool=2), reference(x, weight, bias, EPS, False, 2), 1e-5)


def test_no_image_and_one_pixel():
    _, weight, bias = case((1, 5, 2, 2))
    assert instance_norm(torch.empty(0, 5, 4, 4).double(), weight, bias, EPS, pool=2).shape == (0, 5, 2, 2)
    batched = torch.func.vmap(lambda x: instance_norm(x, weight, bias, EPS, pool=2))
    assert batched(torch.empty(3, 0, 5, 4, 4).double()).shape == (3, 0, 5, 2, 2)
    assert instance_norm(torch.empty(2, 5, 1, 1).double(), weight, bias, EPS, pool=2).shape == (2, 5, 0, 0)
    alone = instance_norm(torch.rand(2, 5, 1, 1).double(), weight, bias, EPS)
    torch.testing.assert_close(alone[0, :, 0, 0], bias)


def test_what_is_not_a_number_stays_so():
    x, weight, bias = case((2, 3, 4, 4), torch.float32)
    x[1, 2, 0, 0] = float("nan")
    for dtype in (torch.float32, torch.bfloat16):
        out = instance_norm(x.to(dtype), weight.float(), bias.float(), EPS, relu=True, pool=2)
        assert out[1, 2].isnan().all()
        assert out[0].isfinite().all()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_by_vmap():
    x, weight, bias = case((6, 4, 4, 4))
    x = x.unflatten(0, (3, 2))

    def loss(function, weight, x):
        return function(x, weight, bias).square().sum()

    def ours(x, w, b):
        return instance_norm(x, w, b, EPS, relu=True, pool=2)

    def plain(x, w, b):
        return reference(x, w, b, EPS, True, 2)

    actual, expected = (
        torch.func.vmap(torch.func.grad(loss, argnums=1), (None, None, 0))(function, weight, x)
        for function in (ours, plain)
    )
    torch.testing.assert_close(actual, expected)


def test_channels_and_statistics_of_any_strides():
    x, weight, bias = case((3, 4, 4, 4))
    own = [torch.stack([value, value + 1], 1)[:, 0].requires_grad_() for value in (weight, bias)]
    assert not own[0].is_contiguous()
    ours, expected = (
        derivatives(lambda *i: instance_norm(*i, EPS, relu=True, pool=2), [leaf, *channels], 2)
        for channels in (own, [weight.requires_grad_(), bias.requires_grad_()])
        for leaf in (x.clone().requires_grad_(),)
    )
    for actual, wanted in zip(ours, expected, strict=True):
        assert torch.equal(actual, wanted)


def test_the_jacobian_of_one_image_is_that_of_one_of_two():
    network = ConvNet(1, 3, width=32, depth=2, image_size=(8, 8))
    x = torch.randn(2, 1, 8, 8, generator=generator(0, "jacobian"))
    both = torch.func.jacrev(network)(x)
    torch.testing.assert_close(torch.func.jacrev(network)(x[:1])[0, :, 0], both[0, :, 0])


def test_bad_arguments_are_named():
    x, weight, bias = case((2, 3, 4, 4), torch.float32)
    for call, message in (
        (
            lambda: torch.ops.mim4dd.instance_norm(x[0], weight.float(), bias.float(), EPS, True, 2),
            "x must be",
        ),
        (
            lambda: torch.ops.mim4dd.instance_norm(x, weight.float(), bias.float(), EPS, True, 3),
            "pool must be",
        ),
        (
            lambda: torch.ops.mim4dd.instance_norm(x, weight[:2].float(), bias.float(), EPS, True, 2),
            "weight and",
        ),
        (lambda: torch.ops.mim4dd.instance_norm(x, weight, bias, EPS, True, 2), "weight and bias must"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_bias_that_the_normalisation_removes_has_no_gradient():
    network = ConvNet(3, 5, width=8, depth=2, image_size=(12, 12))
    x = torch.randn(4, 3, 12, 12, generator=generator(0, "x"))
    before = network(x)
    before.square().sum().backward()
    for block in network.blocks:
        assert torch.equal(block[0].bias.grad, torch.zeros_like(block[0].bias))
        assert block[1].bias.grad.abs().min() > 0
    bias = network.blocks[0][0].bias
    with torch.no_grad():
        bias += 5
    torch.testing.assert_close(network(x), before)
