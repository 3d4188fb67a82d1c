"""What has no derivative of a higher order says so, however it is asked for."""

import pytest
import torch
from torch.func import grad, vmap

from mim4dd import extension
from mim4dd.networks import create
from mim4dd.networks.first_block import first_block
from mim4dd.networks.normalisation import instance_norm
from mim4dd.objectives import trajectory_distance
from mim4dd.seeding import generator

compiled = pytest.mark.skipif(not extension.available(), reason="the extension is not built")


def random(*shape):
    return torch.randn(shape, generator=generator(0, "derivatives"))


TAPS = random(32, 3, 3, 3)


def normalised(x):
    return (instance_norm(x, torch.ones(3), torch.zeros(3), 1e-5) ** 3).sum()


def blocked(x):
    options = {"padding": 3, "relu": True, "pool": 2}
    return (first_block(x, TAPS, torch.ones(32), torch.zeros(32), 1e-5, **options) ** 3).sum()


def followed(x):
    network = create("mlp", 3, 2, (4, 4), width=8)
    start = {name: random(*weight.shape) for name, weight in network.named_parameters()}
    target = {name: weight + 0.1 for name, weight in start.items()}
    return trajectory_distance(network, start, target, x, torch.arange(2), steps=2, step_size=0.1)


CASES = [
    pytest.param(normalised, 2, id="instance_norm", marks=compiled),
    pytest.param(blocked, 2, id="first_block", marks=compiled),
    pytest.param(followed, 1, id="trajectory"),
]


def directional(function, direction, times):
    """The derivative along `direction`, as often as said, by torch.autograd, still differentiable."""

    def derivative(x):
        value = function(x)
        for _ in range(times):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            value = (gradient * direction).sum()
        return value

    return derivative


@pytest.mark.parametrize(("function", "order"), CASES)
def test_one_derivative_more_is_refused(function, order):
    x, direction = random(2, 3, 4, 4).requires_grad_(), random(2, 3, 4, 4)
    last = directional(function, direction, order)(x)
    with pytest.raises(RuntimeError, match=r"mim4dd: there is no derivative of this order; .*differentiable"):
        (last + x.sum()).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="there is no derivative of this order"):
        torch.autograd.grad(last + x.sum(), x)  # nor is it left out of a sum


@pytest.mark.parametrize(("function", "order"), CASES)
def test_a_last_derivative_may_go_on_to_what_does_not_need_the_next(function, order):
    """Along a direction that is learned, say."""
    x, direction = random(2, 3, 4, 4).requires_grad_(), random(2, 3, 4, 4).requires_grad_()
    before = directional(function, direction.detach(), order - 1)
    (gradient,) = torch.autograd.grad(before(x), x, create_graph=True)
    (by_direction,) = torch.autograd.grad((gradient * direction).sum(), direction)
    assert torch.equal(by_direction, torch.autograd.grad(before(x), x)[0])


@compiled
@pytest.mark.parametrize("function", [normalised, blocked])
def test_a_third_derivative_is_refused_inside_transforms_too(function):
    x, direction = random(2, 2, 3, 4, 4), random(2, 3, 4, 4)

    def once(function):
        return lambda x: (grad(function)(x) * direction).sum()

    second = vmap(grad(once(function)))
    for image, ours in zip(x, second(x), strict=True):
        leaf = image.requires_grad_()
        (expected,) = torch.autograd.grad(directional(function, direction, 1)(leaf), leaf)
        torch.testing.assert_close(ours, expected)
    with pytest.raises(RuntimeError, match="there is no derivative of this order"):
        vmap(grad(once(once(function))))(x)
