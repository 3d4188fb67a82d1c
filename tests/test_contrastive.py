"""What a drop-in needs, on every path that runs here: gradients of any order, layers, DDP, checkpointing."""

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from conftest import FORMS, close, labelled_features, labelled_leaves
from torch.utils.checkpoint import checkpoint

import mim4dd
from mim4dd import losses
from mim4dd.losses import contrastive, reference


def any_positive(*batch, **options):
    return mim4dd.info_nce_loss(*batch, positives="any", **options)


def nce(a, k, la, lk, **options):
    return mim4dd.nce_loss(a, k, la, lk, temperature=0.3, noise_ratio=2.0, negatives=5.0, **options)


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(
    ("m", "n", "d"), [(0, 5, 3), (5, 0, 3), (0, 0, 3), (1, 1, 1), (33, 50, 7), (50, 50, 7)]
)
def test_chunks_change_nothing(monkeypatch, form, m, n, d, exclude_self):
    if exclude_self and m != n:
        pytest.skip("as many keys as anchors")
    form = replace(form, exclude_self=exclude_self)
    monkeypatch.setattr(reference, "CHUNK_PAIRS", 7 * 50)
    a, k, la, lk = labelled_leaves(m, n, d, dtype=torch.float64)
    scales = torch.tensor([0.3, 2.0], dtype=torch.float64, requires_grad=True)
    plain = reference.plain(form, scales, la, lk, a, k)
    expected = torch.autograd.grad(plain, (scales, a, k))
    with torch.no_grad():
        chunked = reference.chunked(form, scales, la, lk, a, k, (True, True, True))
    torch.testing.assert_close(chunked, [plain.detach(), *expected])


@pytest.mark.parametrize("wanted", [(False, True, False), (False, False, True), (True, False, False)])
def test_only_the_side_that_asks_gets_a_gradient(wanted):
    a, k, la, lk = labelled_leaves(5, 6, 4)
    temperature = torch.tensor(0.3)
    for value, want in zip((temperature, a, k), wanted, strict=True):
        value.requires_grad_(want)
    mim4dd.nce_loss(a, k, la, lk, temperature=temperature).backward()
    assert [value.grad is not None for value in (temperature, a, k)] == list(wanted)


def test_no_pair_matrix_is_held():
    # 4,096 x 4,096 float32 is 64 MiB; the traced allocations are those of one chunk and of the features.
    a, k, la, lk = labelled_leaves(4096, 4096, 8)
    with torch.profiler.profile(profile_memory=True) as profile:
        mim4dd.nce_loss(a, k, la, lk).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= 2 * 4 * reference.CHUNK_PAIRS < 4 * 4096 * 4096


def test_second_derivatives_are_those_of_the_formula():
    a, k, la, lk = labelled_leaves(4, 5, 3, dtype=torch.float64)
    for loss in (mim4dd.nce_loss, mim4dd.info_nce_loss, any_positive):
        assert torch.autograd.gradgradcheck(lambda a, k, loss=loss: loss(a, k, la, lk), (a, k))


def test_upstream_gradient_scales_and_backward_repeats():
    a, k, la, lk = labelled_leaves(5, 6, 4)
    loss = nce(a, k, la, lk)
    once = torch.autograd.grad(loss, (a, k), retain_graph=True)
    again = torch.autograd.grad(-3 * loss, (a, k))
    torch.testing.assert_close([-3 * g for g in once], list(again))


def test_layers_in_one_call_equal_single_calls():
    la, lk = torch.arange(6) % 3, torch.arange(9) % 3
    anchors = [torch.randn(6, d, requires_grad=True) for d in (5, 16, 3)]
    keys = [torch.randn(9, d, requires_grad=True) for d in (5, 16, 3)]
    ratios = [torch.tensor(r, requires_grad=True) for r in (0.5, 1.0, 2.0)]
    losses = mim4dd.nce_losses(anchors, keys, la, lk, noise_ratio=ratios)
    single = [
        mim4dd.nce_loss(a, k, la, lk, noise_ratio=r) for a, k, r in zip(anchors, keys, ratios, strict=True)
    ]
    torch.testing.assert_close(losses, torch.stack(single))
    weights = torch.tensor([1.0, 2.0, 4.0])
    inputs = [*anchors, *keys, *ratios]
    torch.testing.assert_close(
        torch.autograd.grad(losses @ weights, inputs),
        torch.autograd.grad(torch.stack(single) @ weights, inputs),
    )
    for several in (mim4dd.nce_losses, mim4dd.info_nce_losses):
        with pytest.raises(ValueError, match="anchors has 3 layers, keys 2"):
            several(anchors, keys[:2], la, lk)
        with pytest.raises(ValueError, match=r"keys is a tensor \[3, 9, 4\], expected a list, one tensor"):
            several(anchors, torch.zeros(3, 9, 4), la, lk)
    with pytest.raises(ValueError, match="noise_ratio has 2 numbers, expected one or 3"):
        mim4dd.nce_losses(anchors, keys, la, lk, noise_ratio=ratios[:2])
    for options in ({"positives": "any"}, {"temperature": 0.3, "symmetric": True}):
        single = [mim4dd.info_nce_loss(*side, la, lk, **options) for side in zip(anchors, keys, strict=True)]
        losses = mim4dd.info_nce_losses(anchors, keys, la, lk, **options)
        torch.testing.assert_close(losses, torch.stack(single))
    pairs = [side[:6] for side in keys]
    single = [mim4dd.info_nce_loss(*side) for side in zip(anchors, pairs, strict=True)]
    torch.testing.assert_close(mim4dd.info_nce_losses(anchors, pairs), torch.stack(single))


def test_checkpointing():
    a, k, la, lk = labelled_leaves(5, 6, 4)
    expected = torch.autograd.grad(nce(a * 2, k, la, lk), (a, k))
    for reentrant in (False, True):
        loss = checkpoint(lambda a, k: nce(a * 2, k, la, lk), a, k, use_reentrant=reentrant)
        torch.testing.assert_close(_gradients(loss, a, k), expected)


def _gradients(loss, *leaves):
    for leaf in leaves:
        leaf.grad = None
    loss.backward()
    return tuple(leaf.grad for leaf in leaves)


def test_autocast_changes_nothing():
    a, k, la, lk = labelled_leaves(5, 6, 4)
    expected = nce(a, k, la, lk)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = nce(a, k, la, lk)
        mixed = nce(a.bfloat16(), k, la, lk)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, expected, rtol=1e-2, atol=1e-2)
    assert all(g.isfinite().all() for g in torch.autograd.grad(mixed, (a, k)))


def test_float16_gradients_do_not_underflow_before_the_loss_scale():
    a, k, la, lk = labelled_leaves(64, 64, 16, dtype=torch.float16)
    wide = (a.detach().float() * 1024).requires_grad_()
    narrow = wide.detach().half().requires_grad_()
    scale = 2.0**16
    (expected,) = torch.autograd.grad(nce(wide, k.float(), la, lk) * scale, wide)
    (actual,) = torch.autograd.grad(nce(narrow, k, la, lk) * scale, narrow)
    close(actual, expected, 2e-3)


class _Tower(torch.nn.Linear):
    """With a temperature of its own."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(4, 4)
        self.temperature = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, rows):
        return super().forward(rows), self.temperature.clone()


def _of_one_rank(model, a, k, la, lk):
    rows, temperature = model(a)
    return mim4dd.nce_loss(rows, k, la, lk, temperature=temperature)


def _of_all_ranks(model, a, k, la, lk, gather=lambda rows: rows):
    rows, temperature = model(a)
    whole = mim4dd.info_nce_loss(gather(rows), gather(k), temperature=temperature, symmetric=True)
    return whole + mim4dd.nce_loss(rows, gather(k), la, gather(lk), temperature=temperature)


def _batch(rank: int):
    return [value.detach() for value in labelled_leaves(5, 5, 4, seed=rank)]


def _rank(rank: int, path: str, results) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    page = (Path(__file__).parent.parent / "docs/losses.md").read_text()
    recipe = {"torch": torch, **dict(zip(("images", "texts", "labels"), _batch(rank), strict=False))}
    exec(re.search(r"```python\n(class Gather.*?)```", page, re.S)[1], recipe)
    for loss, options in ((_of_one_rank, {}), (_of_all_ranks, {"gather": recipe["Gather"].apply})):
        model = torch.nn.parallel.DistributedDataParallel(_Tower())
        loss(model, *_batch(rank), **options).backward()
        results[loss.__name__, rank] = [parameter.grad.numpy() for parameter in model.parameters()]
    torch.distributed.destroy_process_group()
    time.sleep(0.2)  # for gloo's threads, before `model` frees the group: it waits for them, holding the GIL


def test_distributed_data_parallel_averages_over_ranks(tmp_path):
    """The losses of each rank, or those of all rows, gathered by the recipe of docs/losses.md."""
    model = _Tower()
    parameters = list(model.parameters())
    batches = [_batch(rank) for rank in range(2)]
    apart = sum(_of_one_rank(model, *batch) for batch in batches) / 2
    together = _of_all_ranks(model, *map(torch.cat, zip(*batches, strict=True)))
    expected = {
        "_of_one_rank": torch.autograd.grad(apart, parameters),
        "_of_all_ranks": torch.autograd.grad(together, parameters),
    }
    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(_rank, (str(tmp_path / "store"), results), nprocs=2, start_method="spawn")
        for (name, _), gradients in results.items():
            torch.testing.assert_close([torch.from_numpy(g) for g in gradients], [*expected[name]])
        assert len(results) == 4


def test_without_gradients_none_are_worked_out(monkeypatch):
    a, k, la, lk = labelled_features(5, 6, 4, 2)
    asked = []
    evaluate = contrastive._evaluate
    monkeypatch.setattr(contrastive, "_evaluate", lambda *given: asked.append(given[-1]) or evaluate(*given))
    with torch.no_grad():
        mim4dd.nce_loss(a.requires_grad_(), k, la, lk)
    mim4dd.nce_loss(a, k, la, lk)
    assert asked == [[False, False, False], [False, True, False]]


def test_a_cpu_takes_the_reference_even_where_kernels_are_interpreted(monkeypatch):
    a, k, la, lk = labelled_features(5, 6, 4, 2, dtype=torch.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    taken = []
    call = losses.contrastive_losses
    monkeypatch.setattr(
        losses,
        "contrastive_losses",
        lambda form, backend, *rest: taken.append(backend) or call(form, backend, *rest),
    )
    mim4dd.nce_loss(a, k, la, lk)
    assert taken == ["reference"]
