"""Every entry of the launch table, compiled ahead of time for sm_80 and sm_90: no GPU needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED_LIMIT = {80: 166_912, 90: 232_448}


# A process of its own, as one process either interprets kernels or compiles them.
@pytest.mark.parametrize("precision", ["half", "tf32", "ieee"])
@pytest.mark.parametrize("capability", [80, 90])
def test_no_spills_within_shared_memory_on_tensor_cores(capability, precision):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.kernel_resources", "--json"]
    command += ["--sm", str(capability), "--precision", precision]
    root = Path(__file__).parents[1]
    output = subprocess.run(
        command, cwd=root, env=environment, check=True, capture_output=True, text=True
    ).stdout
    rows = [json.loads(line) for line in output.splitlines()]
    assert {row["kernel"] for row in rows} == {
        "skinny_kernels.dots_kernel",
        "skinny_kernels.sums_kernel",
        "skinny_kernels.pairs_kernel",
        "finish_kernels.finish_kernel",
        "block_kernels.rows_kernel",
        "block_kernels.sums_kernel",
        "block_kernels.pairs_kernel",
    }
    assert [row for row in rows if row["spilled"]] == []
    for row in rows:
        assert row["shared"] <= row["shared_estimate"] <= SHARED_LIMIT[capability]
        if row["tile"][2] is None or "rows" in row["kernel"]:
            continue  # forms no products
        assert row["cp_async"] > 0, row
        if precision != "ieee":
            # Below 64 rows there is no warp-group product.
            kind = "wgmma" if capability == 90 and row["tile"][0] >= 64 else "mma"
            assert row[kind] > 0, row
