"""Every entry of the launch tables, and the layers, compiled for sm_90 in half precision: no GPU needed. For
float32 and other devices the largest of each, with the loss that takes the most registers; `python -m
bench.kernel_resources` compiles the others.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED_LIMIT = {80: 166_912, 90: 232_448}
KERNELS = {
    "skinny_kernels.dots_kernel",
    "skinny_kernels.sums_kernel",
    "skinny_kernels.pairs_kernel",
    "finish_kernels.finish_kernel",
    "wide_kernels.sums_kernel",
    "wide_kernels.pairs_kernel",
    "side_kernels.rows_kernel",
    "side_kernels.gradient_kernel",
    "normalisation_kernels.forward_kernel",
    "normalisation_kernels.backward_kernel",
    "normalisation_kernels.backward_twice_kernel",
    "first_block_kernels.forward_kernel",
    "first_block_kernels.backward_kernel",
    "grad_weight_kernels.sums_kernel",
    "grad_weight_kernels.total_kernel",
}


def compiled(capability: int, precision: str, *options: str) -> list[dict]:
    """The rows of a process of its own, as one process either interprets kernels or compiles them."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    module = [sys.executable, "-m", "bench.kernel_resources", "--json"]
    command = [*module, "--sm", str(capability), "--precision", precision, *options]
    root = Path(__file__).parents[1]
    output = subprocess.run(command, cwd=root, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in output.stdout.splitlines()]


@pytest.mark.parametrize(
    ("capability", "precision", "options"),
    [
        (90, "half", []),
        *((90, name, ["--largest"]) for name in ("tf32", "ieee")),
        (80, "half", ["--largest"]),
    ],
)
def test_no_spills_within_shared_memory_on_tensor_cores(capability, precision, options):
    rows = compiled(capability, precision, *options)
    kernels = KERNELS | (set() if precision == "ieee" else {"narrow_kernels.narrow_kernel"})
    assert {row["kernel"] for row in rows} == kernels
    if not options:
        for kernel in kernels:
            losses = {row["loss"] for row in rows if row["kernel"] == kernel}
            assert losses in ({None}, {"info_nce", "info_nce_any"}, {"nce", "info_nce", "info_nce_any"})
    # The first block's tiles are those an H100 was fastest with, although images of colour spill a little;
    # the tile of a weight's gradient is for products of warp groups, which come with sm_90.
    may_spill = {"first_block_kernels": 400, "grad_weight_kernels": 200 if capability < 90 else 0}
    spilled = [row for row in rows if row["spilled"] > may_spill.get(row["kernel"].split(".")[0], 0)]
    assert not spilled
    for row in rows:  # the interpreter's passes it in any case
        if row["kernel"] in ("first_block_kernels.forward_kernel", "normalisation_kernels.forward_kernel"):
            assert row["drops_nan"] == 0, row
    for row in rows:
        assert row["shared"] <= row["shared_estimate"] <= SHARED_LIMIT[capability]
        if row["tile"][2] is None or "side_kernels" in row["kernel"]:
            continue  # forms no products
        # The TF32 operand of both products of the narrow kernel goes through registers: one layout for each.
        assert row["cp_async"] > 0 or (row["precision"] == "tf32" and "narrow" in row["kernel"]), row
        if row["precision"] != "ieee":
            # Below 64 rows there is no warp-group product.
            kind = "wgmma" if capability == 90 and row["tile"][0] >= 64 else "mma"
            assert row[kind] > 0, row


def test_blocks_of_pairs_compile_for_newer_devices():
    """There a sum over a sum does not (Triton 3.7)."""
    found = compiled(100, "half", "--tables", "LONG_WIDE")
    pairs = [row for row in found if row["kernel"] == "wide_kernels.pairs_kernel"]
    assert {row["loss"] for row in pairs} == {"nce", "info_nce", "info_nce_any"}
    assert all(row["mma"] == row["wgmma"] == 0 and row["spilled"] <= 100 for row in pairs)
