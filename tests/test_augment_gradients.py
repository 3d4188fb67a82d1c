"""The augmentation inside autograd, `torch.func`, inference mode and `torch.compile`."""

import dataclasses
import shutil

import pytest
import torch
from conftest import random_params

from mim4dd import augment

BACKENDS = ["reference", "fused"]
PARTS = augment.DSA.split("_")


@pytest.mark.parametrize(
    ("strategy", "align_corners", "backend"),
    [
        *((part, True, "fused") for part in PARTS),
        *((augment.DSA, align, backend) for align in (True, False) for backend in BACKENDS),
    ],
)
def test_gradients_once_and_twice(generator, backend, align_corners, strategy):
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    params = augment.sample(strategy, 2, (3, 4), generator=generator, mode="all")

    def function(x):
        return augment.apply(x, params, align_corners=align_corners, backend=backend)

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(lambda x: function(x) ** 2, x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_inside_torch_func(generator, backend):
    """Once, twice, after `vjp` is over, and where the images are constants or parameters are drawn inside."""
    x, upstream = (torch.randn(3, 2, 4, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    mean, std = torch.tensor([0.4, 0.5]), torch.tensor([0.2, 0.3])
    seed = generator.get_state()

    def function(x):
        params = augment.sample(augment.DSA, 3, (4, 5), generator=generator.set_state(seed), mode="all")
        return augment.apply(x, params, mean=mean, std=std, backend=backend)

    def total(x):
        return function(x).pow(3).sum()

    def of_gradient(gradient):
        return lambda x: gradient(x).square().sum()

    def by_autograd(x):
        return torch.autograd.grad(total(x), x, create_graph=True)[0]

    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(total)(x), by_autograd(leaf))
    torch.testing.assert_close(
        torch.func.grad(of_gradient(torch.func.grad(total)))(x),
        torch.autograd.grad(of_gradient(by_autograd)(leaf), leaf)[0],
    )
    expected = torch.autograd.grad(function(leaf), leaf, upstream)
    y, pull = torch.func.vjp(function, x)
    torch.testing.assert_close(pull(upstream), expected)
    upstream.requires_grad_()
    (twice,) = torch.autograd.grad(pull(upstream)[0].square().sum(), upstream)
    again = torch.autograd.grad(function(leaf), leaf, upstream, create_graph=True)[0].square().sum()
    torch.testing.assert_close(twice, torch.autograd.grad(again, upstream)[0])
    torch.testing.assert_close(torch.func.grad(lambda weight: (function(x) * weight).sum())(upstream), y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_was_made_in_inference_mode_serves_training(generator, backend):
    x = torch.rand(2, 3, 6, 6, generator=generator, dtype=torch.float64, requires_grad=True)

    def arguments():
        mean, std, rows = torch.full((3,), 0.5), torch.full((3,), 0.25), torch.tensor([2, 0])
        return {"params": random_params(3, (6, 6)), "rows": rows, "mean": mean, "std": std}

    def gradients(given):
        total = augment.apply(x, **given, backend=backend).pow(3).sum()
        (once,) = torch.autograd.grad(total, x, create_graph=True)
        return once, *torch.autograd.grad(once.square().sum(), x)

    plain = arguments()
    with torch.inference_mode():
        made = arguments()
    for name in plain:
        torch.testing.assert_close(gradients({**plain, name: made[name]}), gradients(plain))


@pytest.mark.parametrize("adjoint", [False, True])
def test_compiled_op_is_well_registered(generator, adjoint):
    x = torch.randn(2, 3, 4, 5, generator=generator, requires_grad=True)
    fields = list(vars(random_params(3, (4, 5))).values())
    mean, std = torch.rand(3, generator=generator), torch.ones(3)
    for rows, m, s in ((torch.tensor([2, 0]), mean, std), (None, None, None)):
        chosen = fields if rows is not None else [field[:2] for field in fields]
        torch.library.opcheck(torch.ops.mim4dd.augment, (x, chosen, rows, m, s, True, adjoint))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(generator, compiler):
    if compiler == "inductor" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    x = torch.randn(3, 3, 8, 8, generator=generator, requires_grad=True)
    params, rows = random_params(2, (8, 8)), torch.tensor([0, 1, 1])

    def function(x):
        return augment.apply(x * 2, params, rows=rows).relu()

    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    upstream = torch.randn(x.shape, generator=generator)
    torch.testing.assert_close(compiled(x), function(x))
    (actual,), (expected,) = (torch.autograd.grad(f(x), x, upstream) for f in (compiled, function))
    torch.testing.assert_close(actual, expected)


def test_gradient_is_the_adjoint_for_hostile_parameters(generator):
    """<A x, g> = <x, A' g>, whatever the parameters; a plane never lets anything outside the image in."""
    x, g = (torch.randn(6, 3, 7, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    extreme = torch.tensor([0.0, -1.0, 1e-30, 1e30, -40.0, 1.0])
    far = torch.tensor([2**62, -(2**62), 40, -40, 0, 3])
    params = dataclasses.replace(
        random_params(6, (7, 9)),
        brightness=torch.zeros(6),
        scale_x=extreme,
        scale_y=extreme.flip(0),
        degrees=extreme * 7,
        shift_y=far,
        shift_x=far.flip(0),
        cutout=torch.stack([far, far.flip(0), far.flip(0), far], 1),
    )
    x.requires_grad_()
    y = augment.apply(x, params, backend="fused")
    assert y.isfinite().all()
    (adjoint,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close((y * g).sum(), (x * adjoint).sum())


def test_the_reference_compiles_without_a_graph_break(generator):
    x, params = torch.randn(2, 3, 8, 8, generator=generator), random_params(2, (8, 8))

    def function(x):
        return augment.apply(x, params, backend="reference")

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), function(x))
