"""The contrastive losses: fused or in chunks, beside the plain formula and the plain formula compiled.

    python -m pytest bench/test_losses.py --benchmark-enable --benchmark-json=losses.json
    python -m bench.report losses.json

Forward, or forward and backward, from features to loss and gradients. The floor is the time no implementation
can beat: the larger of the operations over the matrix rate and the bytes over the copy rate, both measured in
the same run, before every case. On a GPU the L2 is cold and a call is timed with a synchronisation; of the
skinny sizes the time of a CUDA graph is there too, which is that of the GPU alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass

import pytest
import torch
from torch import Tensor

import mim4dd
from bench import measure
from mim4dd.losses import reference
from mim4dd.losses.form import LossForm

SECONDS = {"cpu": 4.0, "cuda": 1.0}  # for the rounds of a case, at least five of them


@dataclass(frozen=True)
class Case:
    """M anchors and N keys of these widths, one loss a width; `gradients` to none, anchors or both sides."""

    device: str
    m: int
    n: int
    widths: tuple[int, ...]
    dtype: str
    gradients: str
    loss: str = "nce"

    def __str__(self) -> str:
        widths = "+".join(map(str, self.widths))
        parts = (self.device, self.loss, f"{self.m}x{self.n}x{widths}", self.dtype, self.gradients)
        return "-".join(parts).replace(" ", "-")

    @property
    def skinny(self) -> bool:
        return self.m < self.n


CASES = [
    *(
        Case("cpu", 8192, 8192, (128,), "float32", gradients, loss)
        for loss in ("nce", "info_nce")
        for gradients in ("both", "none")
    ),
    Case("cpu", 100, 2560, (2048,), "float32", "anchors"),
    Case("cpu", 10, 640, (512,), "float32", "anchors"),
]
LAYERS = (32768, 8192, 2048)
if torch.cuda.is_available():
    skinny = ((100, 2560, LAYERS), (100, 2560, (2048,)), (500, 2560, (32768,)))
    # What matters most first: the time may be up before the end.
    CASES += [Case("cuda", *size, "bfloat16", passes) for size in skinny for passes in ("anchors", "none")]
    CASES += [Case("cuda", *skinny[0], "bfloat16", passes, "info_nce_any") for passes in ("anchors", "none")]
    CASES += [
        Case("cuda", size, size, (512,), "bfloat16", passes, loss)
        for size, loss in (
            (16384, "nce"),
            (262144, "nce"),
            (16384, "info_nce"),
            (16384, "info_nce_any"),
            (16384, "info_nce symmetric"),
        )
        for passes in ("both", "none")
    ]
    CASES += [Case("cuda", *size, "float32", passes) for size in skinny for passes in ("anchors", "none")]


def least_work(case: Case) -> dict[str, int]:
    """To form logits once and each gradient as one product, and to move features and gradients once."""
    products = 1 + {"none": 0, "anchors": 1, "both": 2}[case.gradients]
    rows = case.m + case.n + {"none": 0, "anchors": case.m, "both": case.m + case.n}[case.gradients]
    return {
        "operations": 2 * products * case.m * case.n * sum(case.widths),
        "bytes": rows * sum(case.widths) * getattr(torch, case.dtype).itemsize,
    }


def steps(case: Case) -> dict[str, Callable[[], Tensor]]:
    """What is timed, by name, ours first: each makes the gradients and returns the loss."""
    generator = torch.Generator(case.device).manual_seed(0)

    def rows(count: int, wanted: bool) -> list[Tensor]:
        made = [torch.randn(count, d, device=case.device, generator=generator) for d in case.widths]
        return [value.to(getattr(torch, case.dtype)).requires_grad_(wanted) for value in made]

    anchors, keys = rows(case.m, case.gradients != "none"), rows(case.n, case.gradients == "both")
    labels = [torch.randint(100, (n,), device=case.device, generator=generator) for n in (case.m, case.n)]
    leaves = [value for value in (*anchors, *keys) if value.requires_grad]
    scales = torch.tensor([0.1, 1.0], device=case.device)
    name, symmetric = case.loss.split()[0], case.loss.endswith("symmetric")
    function = name.removesuffix("_any")
    options = {"symmetric": symmetric} | ({"positives": "any"} if name.endswith("_any") else {})

    def ours() -> Tensor:
        if len(case.widths) > 1:
            return getattr(mim4dd, f"{function}_losses")(anchors, keys, *labels, **options).sum()
        return getattr(mim4dd, f"{function}_loss")(*anchors, *keys, *labels, **options)

    def formula() -> Tensor:
        form = LossForm(name, symmetric=symmetric)
        return sum(reference.plain(form, scales, *labels, a, k) for a, k in zip(anchors, keys, strict=True))

    losses = {"fused" if case.device == "cuda" else "chunked": ours, "eager": formula}
    if case.device == "cuda":
        torch.compiler.reset()  # or a few cases on it would be left eager
        losses["torch.compile"] = torch.compile(formula, dynamic=False)

    def step(loss: Callable[[], Tensor]) -> Tensor:
        value = loss()
        if leaves:
            torch.autograd.grad(value, leaves)
        return value.detach()

    return {name: functools.partial(step, loss) for name, loss in losses.items()}


@pytest.fixture
def tensor_cores(case):
    """The formula goes through float32: beside half precision it may use tensor cores too (TF32)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if case.dtype == "float32" else "high")
    yield
    torch.set_float32_matmul_precision(before)


def first_loss(call: Callable[[], Tensor]) -> float | None:
    """None where it does not fit in memory."""
    try:
        return call().item()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("tensor_cores")
def test_losses(benchmark, case):
    if benchmark.disabled and case.device == "cpu":
        pytest.skip("nothing is timed; tests/ has the equality")
    calls = steps(case)
    if benchmark.disabled:  # what is to be timed later is compiled, see gpu.sh
        del calls["eager"]
    losses = {name: first_loss(call) for name, call in calls.items()}
    left_out = {name: "does not fit in memory" for name, loss in losses.items() if loss is None}
    ours, *others = calls = {name: call for name, call in calls.items() if name not in left_out}
    for name in others:
        assert losses[name] == pytest.approx(losses[ours], rel=1e-2), name
    if benchmark.disabled:
        return
    # For every case anew: what else the machine does can only lower them, so the highest of a run counts.
    rates = {
        "matrix_rate": measure.matrix_rate(case.device, getattr(torch, case.dtype)),
        "copy_rate": measure.copy_rate(case.device),
    }
    peaks = {name: measure.extra_peak(call, case.device) for name, call in calls.items()}
    rounds = measure.rounds_within(SECONDS[case.device], calls, case.device)
    medians = measure.in_turn(benchmark, calls, case.device, rounds, lambda _: measure.cool(case.device))
    benchmark.extra_info |= {
        **asdict(case),
        **least_work(case),
        **rates,
        "left_out": left_out,
        "variants": {
            name: {
                "milliseconds": 1e3 * medians[name],
                "extra_peak_mib": peaks[name] / 2**20,
                **(only_on_a_gpu(case, call) if case.device == "cuda" else {}),
            }
            for name, call in calls.items()
        },
    }


def only_on_a_gpu(case: Case, call: Callable[[], Tensor]) -> dict[str, float | None]:
    replayed = measure.replayed(call, 20) if case.skinny else None
    return {
        "launches": measure.launches(call),
        "replayed_milliseconds": None if replayed is None else 1e3 * replayed,
    }
