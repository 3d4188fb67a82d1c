"""The public losses through the fused kernels, as torch uses them; without a GPU in Triton's interpreter."""

import time

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import mim4dd

pytest.importorskip("triton")

import numerics
import pairs
from pairs import DEVICE, problem

path, poisoned = pairs.path, numerics.poisoned  # fixtures


def arguments(dtype=torch.float32):
    _, anchor_labels, key_labels, (a,), (k,) = problem(6, 20, [24], dtype)
    return a.requires_grad_(), k.requires_grad_(), anchor_labels, key_labels


def test_public_functions_agree_on_both_backends():
    a, k, la, lk = arguments()
    temperature = torch.tensor(0.2, device=DEVICE, requires_grad=True)
    noise_ratio = torch.tensor(1.5, device=DEVICE, requires_grad=True)
    results = []
    for backend in ("fused", "reference"):
        nce = mim4dd.nce_loss(
            a, k, la, lk, temperature=temperature, noise_ratio=noise_ratio, symmetric=True, backend=backend
        )
        info = mim4dd.info_nce_loss(a, k, la, lk, temperature=temperature, backend=backend)
        pairs = mim4dd.info_nce_loss(a, k[:6], backend=backend)
        some = mim4dd.info_nce_loss(
            a, k, la, lk, temperature=temperature, positives="any", symmetric=True, backend=backend
        )
        total = nce * 2 + info + pairs + some
        results.append([total, *torch.autograd.grad(total, (a, k, temperature, noise_ratio))])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_non_contiguous_features_and_labels():
    a, k, la, lk = arguments()
    expected = mim4dd.nce_loss(a, k, la, lk, backend="fused")
    wide = torch.stack([k, -k], 2)[..., 0]
    labels = torch.stack([lk, lk], 1)[:, 0]
    assert not wide.is_contiguous()
    torch.testing.assert_close(
        mim4dd.nce_loss(a.T.contiguous().T, wide, la, labels, backend="fused"), expected
    )


def test_second_derivative_through_the_formula():
    a, k, la, lk = arguments()
    results = []
    for backend in ("fused", "reference"):
        loss = mim4dd.nce_loss(a, k, la, lk, backend=backend)
        (gradient,) = torch.autograd.grad(loss, a, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), (a, k)))
    torch.testing.assert_close(*results)


def test_op_passes_opcheck_and_compiles(monkeypatch):
    a, k, la, lk = arguments()
    scales = torch.tensor([[0.3], [2.0]], device=DEVICE, requires_grad=True)
    op = torch.ops.mim4dd.contrastive.default
    options = ("nce", 3.0, True, False, "fused", [True, True, True])
    result = torch.library.opcheck(op, (scales, la, lk, [a, k], *options))
    assert set(result.values()) == {"SUCCESS"}

    def loss(a, k, la, lk):
        return mim4dd.nce_loss(a * 2, k, la, lk, backend="fused")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual, expected = (torch.autograd.grad(f(a, k, la, lk), (a, k)) for f in (compiled, loss))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [[True] * 3, [False, True, False], [False] * 3], ids=str)
def test_fake_tensors_have_the_shapes_of_real_ones(path, dtype, wanted):
    scales, la, lk, anchors, keys = problem(6, 20, [24], dtype)
    call = (scales, la, lk, [*anchors, *keys], "nce", None, True, False, "fused", wanted)
    real = torch.ops.mim4dd.contrastive(*call)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.ops.mim4dd.contrastive(*call)
    assert [(f.shape, f.dtype) for f in fake] == [(r.shape, r.dtype) for r in real]


def test_autocast_and_checkpointing(path):
    a, k, la, lk = arguments()

    def loss(a, k):
        return mim4dd.nce_loss(a * 2, k, la, lk, symmetric=True, backend="fused")

    expected = [loss(a, k), *torch.autograd.grad(loss(a, k), (a, k))]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        value = loss(a, k)
        actual = [value, *torch.autograd.grad(value, (a, k))]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    for reentrant in (False, True):
        a.grad = k.grad = None
        value = checkpoint(loss, a, k, use_reentrant=reentrant)
        value.backward()
        torch.testing.assert_close([value, a.grad, k.grad], expected, rtol=0, atol=0)


def test_data_parallel(path, tmp_path):
    # One process: what is tested is that the hooks of the reducer meet the kernels' gradients.
    init = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=init, rank=0, world_size=1)
    try:
        a, k, la, lk = arguments()
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(24, 24).to(DEVICE))
        mim4dd.nce_loss(model(a.detach()), k.detach(), la, lk, backend="fused").backward()
        actual = model.module.weight.grad.clone()
        model.module.zero_grad()
        mim4dd.nce_loss(model.module(a.detach()), k.detach(), la, lk, backend="reference").backward()
        torch.testing.assert_close(actual, model.module.weight.grad, rtol=1e-4, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()
        # The group is freed with `model`, and waits, holding the GIL, for gloo's threads, which may need it
        # to free their last work: let them have it first.
        time.sleep(0.2)


def test_functional_gradient():
    a, k, la, lk = (value.detach() for value in arguments())
    leaf = a.clone().requires_grad_()
    (expected,) = torch.autograd.grad(mim4dd.nce_loss(leaf, k, la, lk, backend="fused"), leaf)
    actual = torch.func.grad(lambda x: mim4dd.nce_loss(x, k, la, lk, backend="fused"))(a)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_float64_has_no_kernel():
    a, k, la, lk = arguments()
    with pytest.raises(RuntimeError, match="the kernels do not support torch.float64"):
        mim4dd.nce_loss(a.double(), k.double(), la, lk, backend="fused")
