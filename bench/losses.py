"""The contrastive losses timed: fused or chunked, the plain formula, and the plain formula compiled.

    python -m bench.losses [--out DIR] [--seconds 300]

Prints a Markdown table and writes DIR/<device>.json and .md. Each row gives the median time, the peak memory
above the inputs, and the floor as a fraction of that time: the larger of the operations the algorithm needs
over the matrix rate, and the bytes of features and gradients over the copy rate, both measured here first.
Variants of one size are interleaved; a variant that would not fit is left out, and so are the cases that are
left when the time is up.
"""

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

import mim4dd
from mim4dd import reference
from mim4dd.reference import Objective

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@dataclass(frozen=True)
class Case:
    regime: str
    m: int
    n: int
    widths: tuple[int, ...]
    dtype: str
    loss: str = "nce"
    both_sides: bool = False
    backward: bool = True


SKINNY = [
    Case("skinny", m, n, (d,), dtype, backward=backward)
    for dtype in ("bfloat16", "float32")
    for m, n, d in ((100, 2560, 2048), (500, 2560, 32768))
    for backward in (True, False)
]
LAYERS = [
    Case("skinny", 100, 2560, widths, dtype)
    for dtype in ("bfloat16", "float32")
    for widths in ((32768,), (32768, 8192, 2048))
]
LARGE = [
    Case("large", 16384, 16384, (512,), "bfloat16", loss, True, backward)
    for loss in ("nce", "info_nce", "info_nce symmetric")
    for backward in (True, False)
]
LARGE += [Case("large", 262144, 262144, (512,), "bfloat16", "nce", True)]
ON_CPU = [
    Case("large", 8192, 8192, (128,), "float32", loss, True, backward)
    for loss in ("nce", "info_nce")
    for backward in (True, False)
]
ON_CPU += [Case("skinny", 100, 2560, (2048,), "float32")]


def synchronise() -> None:
    if CUDA:
        torch.cuda.synchronize()


def seconds(call: Callable[[], object]) -> float:
    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - start


def ceilings(dtype: torch.dtype) -> tuple[float, float]:
    """Operations a second of a square matrix product, and bytes a second of a copy."""
    size = 8192 if CUDA else 2048
    a = torch.randn(size, size, device=DEVICE).to(dtype)
    product = min(seconds(lambda: a @ a) for _ in range(10))
    source = torch.empty((1 << 30) if CUDA else (1 << 28), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = min(seconds(lambda: target.copy_(source)) for _ in range(10))
    return 2 * size**3 / product, 2 * source.numel() / copy


def floor(case: Case, matrix_rate: float, copy_rate: float) -> float:
    """Seconds no implementation can beat that forms every logit once and each gradient as one product."""
    sides = (1 + case.both_sides) if case.backward else 0
    logits = 2 if case.loss != "nce" and case.backward else 1
    size = torch.empty(0, dtype=getattr(torch, case.dtype)).element_size()
    operations = sum(2 * (logits + sides) * case.m * case.n * width for width in case.widths)
    gradients = (case.m + case.n * case.both_sides) if case.backward else 0
    moved = sum(size * width * (case.m + case.n + 2 * gradients) for width in case.widths)
    return max(operations / matrix_rate, moved / copy_rate)


def variants(case: Case, inputs: tuple) -> dict[str, Callable[[], Tensor]]:
    """What computes the loss of a case, by name."""
    anchors, keys, anchor_labels, key_labels = inputs
    name, symmetric = case.loss.split()[0], case.loss.endswith("symmetric")
    scales = torch.tensor([0.1, 1.0], device=DEVICE)

    def ours() -> Tensor:
        if name == "nce":
            return mim4dd.nce_losses(anchors, keys, anchor_labels, key_labels, symmetric=symmetric).sum()
        return mim4dd.info_nce_loss(anchors[0], keys[0], anchor_labels, key_labels, symmetric=symmetric)

    def formula(anchors: list[Tensor], keys: list[Tensor]) -> Tensor:
        objective = Objective(name, symmetric=symmetric)
        pairs = zip(anchors, keys, strict=True)
        return sum(reference.plain(objective, scales, anchor_labels, key_labels, a, k) for a, k in pairs)

    calls = {"fused" if CUDA else "chunked": ours}
    # The plain formula keeps about eight float32 matrices of all pairs.
    room = torch.cuda.mem_get_info()[0] if CUDA else 8 << 30
    if 32 * case.m * case.n < room:
        calls["eager"] = lambda: formula(anchors, keys)
        if CUDA:
            compiled = torch.compile(formula)
            calls["torch.compile"] = lambda: compiled(anchors, keys)
    return calls


def prepare(case: Case) -> tuple:
    generator = torch.Generator(DEVICE).manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def rows(count: int, wanted: bool) -> list[Tensor]:
        return [
            torch.randn(count, width, device=DEVICE, generator=generator).to(dtype).requires_grad_(wanted)
            for width in case.widths
        ]

    labels = [torch.randint(100, (size,), device=DEVICE, generator=generator) for size in (case.m, case.n)]
    return rows(case.m, case.backward), rows(case.n, case.backward and case.both_sides), *labels


def resident(what: str) -> int:
    """Bytes of this process in memory: "VmRSS" now, "VmHWM" at its peak (Linux)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return 1024 * int(line.split()[1])


def extra_peak(step: Callable[[], None]) -> int:
    """Bytes the step needs at its peak beside what is there before it."""
    gc.collect()
    if not CUDA:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from here
        before = resident("VmRSS")
        step()
        return resident("VmHWM") - before
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(case: Case, rates: tuple[float, float], repeats: int) -> list[dict]:
    inputs = prepare(case)
    leaves = [value for group in inputs[:2] for value in group]

    def step(call: Callable[[], Tensor]) -> None:
        for leaf in leaves:
            leaf.grad = None
        loss = call()
        if case.backward:
            loss.backward()

    calls = variants(case, inputs)
    peaks = {}
    for name, call in calls.items():
        if CUDA:
            step(call)
        peaks[name] = extra_peak(lambda call=call: step(call))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(seconds(lambda call=call: step(call)))
    least = floor(case, *rates)
    return [
        {
            **asdict(case),
            "variant": name,
            "milliseconds": 1e3 * statistics.median(times[name]),
            "of_floor": least / statistics.median(times[name]),
            "extra_peak_bytes": peaks[name],
        }
        for name in calls
    ]


def table(result: dict) -> str:
    lines = [
        f"# Contrastive losses on {result['device']}",
        "",
        f"{result['date']}, torch {result['torch']}, Triton {result['triton']}, mim4dd {result['mim4dd']}. "
        + "; ".join(
            f"{name}: {matrix / 1e12:.2f} TFLOP/s, {copy / 1e9:.0f} GB/s"
            for name, (matrix, copy) in result["ceilings"].items()
        )
        + " measured.",
        "",
        "| loss | M | N | D | dtype | pass | variant | ms | of floor | extra peak MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        sides = "both sides" if row["both_sides"] else "anchors"
        passes = f"forward + backward ({sides})" if row["backward"] else "forward"
        widths = " + ".join(map(str, row["widths"]))
        cells = [row["loss"], row["m"], row["n"], widths, row["dtype"], passes, row["variant"]]
        cells += [f"{row['milliseconds']:.3f}", f"{row['of_floor']:.0%}"]
        cells += [f"{row['extra_peak_bytes'] / 2**20:.0f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--seconds", type=float, default=300, help="start no case after this long")
    parser.add_argument("--repeats", type=int, default=20 if CUDA else 3)
    arguments = parser.parse_args()
    start = time.monotonic()
    device = (
        torch.cuda.get_device_name()
        if CUDA
        else f"{platform.machine()}-cpu-{torch.get_num_threads()}-threads"
    )
    cases = [*SKINNY, *LAYERS, *LARGE] if CUDA else ON_CPU
    rates = {dtype: ceilings(getattr(torch, dtype)) for dtype in sorted({case.dtype for case in cases})}
    result = {
        "device": device,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "triton": triton_version(),
        "mim4dd": mim4dd.__version__,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "ceilings": rates,
        "rows": [],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / device.replace(" ", "-")
    for case in cases:
        if time.monotonic() - start > arguments.seconds:
            break
        result["rows"] += measure(case, rates[case.dtype], 3 if case.m > 100_000 else arguments.repeats)
        # After every case: what was measured stays if the next one is cut off.
        path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        path.with_suffix(".md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
