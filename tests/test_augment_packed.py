"""Parameters that were drawn together, as on a GPU, beside the same ones apart."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mim4dd import augment, extension
from mim4dd.augment import AugmentParams, at_once

PARTS = tuple(augment.DSA.split("_"))


def drawn(rows: int) -> AugmentParams:
    return at_once.draw(PARTS, rows, (6, 7), [torch.Generator().manual_seed(0)], "all")


def apart(params: AugmentParams) -> AugmentParams:
    return AugmentParams(**params.fields())


def same(one: AugmentParams, other: AugmentParams) -> bool:
    return all(
        torch.equal(a, b) and a.dtype == b.dtype
        for a, b in zip(one.fields().values(), other.fields().values(), strict=True)
    )


def test_they_are_parameters_like_others():
    params = drawn(4)
    fields = apart(params)
    assert list(params.stored()) == ["packed"]
    assert list(fields.stored()) == [field.name for field in dataclasses.fields(AugmentParams)]
    identity = AugmentParams.identity(4)
    for name, field in params.fields().items():
        assert (field.shape, field.dtype) == (getattr(identity, name).shape, getattr(identity, name).dtype)
    for made in (copy.copy(params), copy.deepcopy(params), pickle.loads(pickle.dumps(params))):
        assert same(made, fields)
    assert repr(params) == repr(fields)
    assert dataclasses.asdict(params).keys() == dataclasses.asdict(fields).keys()
    half = dataclasses.replace(params, brightness=params.brightness / 2)
    assert same(half, dataclasses.replace(fields, brightness=fields.brightness / 2))
    with pytest.raises(AttributeError, match="has no 'hue'"):
        _ = params.hue
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.flip = ~params.flip


@pytest.mark.parametrize(
    "rows", [torch.tensor([2, 0, 3, 3]), torch.tensor([True, False, True, True]), slice(1, 3), slice(0)]
)
def test_rows_are_picked_together(rows):
    params = drawn(4)
    assert same(params[rows], apart(params)[rows])
    assert list(params[rows].stored()) == list(params.to("meta").stored()) == ["packed"]
    assert same(params.map(torch.flipud), apart(params).map(torch.flipud))


@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("made", ["before", "in inference mode"])
def test_they_augment_alike(generator, made, backend):
    """To the bit, with gradients once and twice, in autograd and in transforms."""
    x, upstream = (torch.rand(3, 2, 6, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    rows, mean, std = torch.tensor([3, 0, 3]), torch.tensor([0.4, 0.5]), torch.tensor([0.2, 0.3])
    with torch.inference_mode(made == "in inference mode"):
        params = drawn(4)

    def results(params):
        def function(x):
            return augment.apply(x, params, rows=rows, mean=mean, std=std, backend=backend)

        y = function(x)
        (once,) = torch.autograd.grad(y, x, upstream * y, create_graph=True)
        twice = torch.autograd.grad(once.square().sum(), x)
        transformed = torch.func.grad(
            lambda x: torch.func.grad(lambda x: function(x).pow(3).sum())(x).square().sum()
        )(x.detach())
        return y, once, *twice, transformed

    for one, other in zip(results(params), results(apart(params)), strict=True):
        assert torch.equal(one, other)


def test_a_change_after_the_call_is_noticed(generator):
    """The gradient needs the parameters as they were."""
    x = torch.rand(4, 2, 6, 7, generator=generator, requires_grad=True)
    params = drawn(4)
    y = augment.apply(x, params)
    params.stored()["packed"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_they_go_through_a_compiled_call(generator, backend, compiler):
    """From outside and as an argument."""
    x = torch.rand(4, 2, 6, 7, generator=generator, requires_grad=True)
    outside, rows = drawn(4), torch.tensor([1, 0, 1, 3])

    def function(x, params):
        once = augment.apply(x, outside, rows=rows, backend=backend)
        return augment.apply(once, params[rows], backend=backend) * params.contrast[:, None, None, None]

    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    for params in (drawn(4), drawn(4)[rows]):
        actual, expected = compiled(x, params), function(x, params)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual.square().sum(), x), torch.autograd.grad(expected.square().sum(), x)
        )


def test_they_may_be_fake():
    with FakeTensorMode() as mode:
        params = AugmentParams.of_packed(torch.rand(4, 13))
        for images in (torch.rand(4, 2, 6, 7), torch.zeros(4, 2, 6, 7, dtype=torch.uint8)):
            y = augment.apply(images, params)
            assert (y.shape, y.dtype) == ((4, 2, 6, 7), torch.float32)
            assert y.fake_mode is mode


@pytest.mark.skipif(not extension.available(), reason="the extension is not built")
def test_the_op_says_what_it_takes(generator):
    x, packed = torch.rand(4, 2, 6, 7, generator=generator, requires_grad=True), drawn(4).stored()["packed"]
    for adjoint in (False, True):
        torch.library.opcheck(torch.ops.mim4dd.augment, (x, [packed], None, None, None, True, adjoint))
    for wrong in (packed.double(), packed[:, 1:], packed[0], packed.long()):
        with pytest.raises(ValueError, match=r"packed params must be float32 \[rows, 13\]"):
            torch.ops.mim4dd.augment(x, [wrong], None, None, None, True, False)
    with pytest.raises(ValueError, match=r"params.brightness is \[4\], expected \[3\]"):
        augment.apply(x[:3], drawn(4))
    with pytest.raises(ValueError, match="params.scale_x is not finite"):
        augment.apply(x, AugmentParams.of_packed(torch.where(torch.arange(13) == 10, torch.nan, packed)))
    with pytest.raises(ValueError, match="params.packed requires a gradient"):
        augment.apply(x, AugmentParams.of_packed(packed.clone().requires_grad_()))
    with pytest.raises(ValueError, match="params.brightness is on meta"):
        augment.apply(x, drawn(4).to("meta"))
