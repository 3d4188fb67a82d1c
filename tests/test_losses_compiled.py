"""The contrastive losses under torch.compile, and the op that they are there."""

import math
import sys
from functools import partial

import pytest
import torch
from conftest import FORMS, labelled_leaves
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import mim4dd
from mim4dd.losses import contrastive, reference

nce = partial(mim4dd.nce_loss, temperature=0.3, noise_ratio=2.0, negatives=5.0)


def test_compiles_once_for_all_numbers():
    a, k, la, lk = (value.detach() for value in labelled_leaves(6, 9, 8))

    def loss(temperature):
        return mim4dd.nce_loss(a, k, la, lk, temperature=temperature, noise_ratio=2 * temperature)

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="eager")
    for temperature in (0.3, 0.5):
        torch.testing.assert_close(compiled(temperature), loss(temperature))
    with pytest.raises(Exception, match="expected a positive number"):
        compiled(-0.3)


def test_numbers_that_change_are_not_compiled_for_one_by_one():
    """As of a temperature that falls: first for the number, then once for all others."""
    a, k, la, lk = labelled_leaves(6, 9, 8)
    engine = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    losses = [
        lambda t: mim4dd.nce_loss(a, k, la, lk, temperature=0.3, noise_ratio=t),
        lambda t: mim4dd.info_nce_loss(a, k, la, lk, temperature=t),
    ]
    for graphs, loss in zip((2, 4), losses, strict=True):
        compiled = torch.compile(loss, fullgraph=True, backend=engine)
        for step in range(1, 12):
            torch.testing.assert_close(compiled(1 / step), loss(1 / step))
        assert engine.frame_count == graphs


@pytest.mark.parametrize("engine", ["aot_eager", "inductor"])
def test_compiles_without_a_break(engine):
    a, k, la, lk = labelled_leaves(6, 9, 8)
    temperature = torch.tensor(0.2, requires_grad=True)

    def step(a, k, la, lk, temperature):
        some = mim4dd.info_nce_loss(a, k, la, lk, temperature=temperature, positives="any")
        return mim4dd.info_nce_loss(a * 2, k, la, lk, temperature=temperature) + nce(a, k, la, lk) + some

    compiled = torch.compile(step, fullgraph=True, backend=engine)
    inputs = (a, k, temperature)
    actual, expected = compiled(a, k, la, lk, temperature), step(a, k, la, lk, temperature)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs))


def test_an_exported_loss_can_be_saved_and_loaded(tmp_path):
    """With both scales as tensors too, as SigLIP has them."""

    class Loss(torch.nn.Module):
        def forward(self, *inputs):
            *tensors, temperature, ratio = inputs
            return mim4dd.nce_loss(*tensors, temperature=temperature, noise_ratio=ratio)

    inputs = (*labelled_leaves(6, 9, 8), torch.tensor(0.2), torch.tensor(2.0))
    torch.export.save(torch.export.export(Loss(), inputs), tmp_path / "loss.pt2")
    loaded = torch.export.load(tmp_path / "loss.pt2").module()
    torch.testing.assert_close(loaded(*inputs), Loss()(*inputs))


def test_an_exported_loss_takes_batches_of_any_size():
    class Loss(torch.nn.Module):
        def forward(self, views, labels):
            own = mim4dd.info_nce_loss(views, views, labels, labels, exclude_self=True)
            return own + mim4dd.info_nce_loss(views, views.sin(), symmetric=True)

    views, _, labels, _ = labelled_leaves(9, 1, 8)
    rows = {0: torch.export.Dim("rows", min=2, max=64)}
    exported = torch.export.export(Loss(), (views[:6], labels[:6]), dynamic_shapes=(rows, rows)).module()
    torch.testing.assert_close(exported(views, labels), Loss()(views, labels))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_formula_compiles(form):
    """In steps that inductor of every torch has: that of 2.11 knows no bool by another dtype."""
    scales, (a, k, la, lk) = torch.tensor([0.3, 2.0]), labelled_leaves(6, 9, 8)

    def loss(a, k):
        return reference.plain(form, scales, la, lk, a, k)

    steps = {node.target for node in make_fx(loss)(a, k).graph.nodes}
    assert torch.ops.aten.view.dtype not in steps
    actual, expected = torch.compile(loss, fullgraph=True)(a, k), loss(a, k)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, (a, k)), torch.autograd.grad(expected, (a, k)))


def test_a_compiled_call_asks_the_device_when_it_runs(monkeypatch):
    """What a GPU can do is not known while a call is traced, which so takes it for fused."""
    a, k, la, lk = labelled_leaves(6, 9, 16)
    monkeypatch.setattr(contrastive, "kernel_obstacle", lambda *_: "it is an old one")
    monkeypatch.setitem(sys.modules, "mim4dd.kernels", None)  # whoever imports them fails
    options = "nce", 3.0, False, False, "fused", [False, True, True]
    scales = torch.tensor([[0.3], [2.0]])
    loss = torch.ops.mim4dd.contrastive(scales, la, lk, [a, k], *options)[0]
    expected = mim4dd.nce_loss(a, k, la, lk, temperature=0.3, noise_ratio=2.0, negatives=3.0)
    assert torch.equal(loss[0], expected)


def test_compiled_calls_name_bad_input():
    a, k, la, lk = labelled_leaves(6, 9, 8)
    compiled = torch.compile(lambda a, k: nce(a, k, la, lk), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"anchors is \[6, 8\] and keys is \[9, 4\]"):
        compiled(a, k[:, :4])


@pytest.mark.parametrize(("place", "bad"), [(4, -0.3), (2, torch.arange(5))], ids=["nce_loss", "the term"])
def test_a_step_that_met_bad_input_compiles_without_a_break(place, bad):
    """After an error torch runs the functions it passed through untraced, and traces those that they call."""
    good = [*labelled_leaves(6, 9, 8), 0.3]
    term = mim4dd.MutualInformation(noise_ratio=1.0)

    def step(*batch):
        return mim4dd.nce_loss(*batch[:4], temperature=batch[4]) if place == 4 else term(*batch[:4])

    torch.compiler.reset()
    with pytest.raises(ValueError, match="temperature is -0.3|synthetic_labels is"):
        torch.compile(step, backend="eager")(*good[:place], bad, *good[place + 1 :])
    actual = torch.compile(step, fullgraph=True, backend="eager")(*good)
    torch.testing.assert_close(actual, step(*good))


@pytest.mark.parametrize("engine", ["aot_eager", "inductor"])
def test_compiles_with_features_of_any_strides(engine):
    a, k, la, lk = labelled_leaves(40, 9, 6)
    turned = a.detach().T.contiguous().T.requires_grad_()
    compiled = torch.compile(lambda a: nce(a, k.detach(), la, lk), fullgraph=True, backend=engine)
    (actual,), (expected,) = (
        torch.autograd.grad(compiled(turned), turned),
        torch.autograd.grad(nce(a, k, la, lk), a),
    )
    torch.testing.assert_close(actual, expected)


WANTED = pytest.mark.parametrize("wanted", [[True] * 3, [False, True, False], [False] * 3], ids=str)


def op_arguments(wanted, dtype=torch.float32):
    scales = torch.tensor([[0.3], [2.0]])
    a, k, la, lk = labelled_leaves(6, 9, 16, dtype=dtype)
    for value, want in zip((scales, a, k), wanted, strict=True):
        value.requires_grad_(want)
    return scales, la, lk, [a, k], "nce", 3.0, True, False, "reference", wanted


@WANTED
def test_op_passes_opcheck(wanted):
    result = torch.library.opcheck(torch.ops.mim4dd.contrastive.default, op_arguments(wanted))
    assert set(result.values()) == {"SUCCESS"}


@WANTED
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fake_tensors_are_like_real_ones(dtype, wanted):
    arguments = op_arguments(wanted, dtype)
    real = torch.ops.mim4dd.contrastive(*arguments)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.ops.mim4dd.contrastive(*arguments)
    assert [(f.shape, f.dtype, f.stride()) for f in fake] == [(r.shape, r.dtype, r.stride()) for r in real]


@pytest.mark.parametrize("engine", ["eager", "inductor"])
def test_compiled_calls_name_a_tensor_that_is_not_positive(engine):
    a, k, la, lk = labelled_leaves(6, 9, 8)
    right = torch.tensor(0.5)

    def loss(temperature, noise_ratio):
        return mim4dd.nce_loss(a, k, la, lk, temperature=temperature, noise_ratio=noise_ratio)

    compiled = torch.compile(loss, fullgraph=True, backend=engine)
    torch.testing.assert_close(compiled(right, right), loss(right, right))
    learned = torch.compile(
        lambda t: mim4dd.info_nce_loss(a, k, la, lk, temperature=t), fullgraph=True, backend=engine
    )
    for wrong in map(torch.tensor, (-0.5, math.inf, 1e-40)):  # float32 does not hold the last
        with pytest.raises(RuntimeError, match="nce_loss: temperature or noise_ratio is not a positive"):
            compiled(wrong, right)
        with pytest.raises(RuntimeError, match="nce_loss: temperature is not a positive"):
            compiled(wrong, 0.5)
        with pytest.raises(RuntimeError, match="info_nce_loss: temperature is not a positive"):
            learned(wrong)
