"""What bench/gpu.sh runs on a machine with a GPU, in what order, and what it makes of failures."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
GPU_TESTS = ("draw", "stacked", "graph", "footprint", "on_gpu", "augment_cuda")
GPU_TESTS += ("normalisation_kernels", "first_block_kernels", "grad_weight_kernels")
GPU_TESTS += ("kernels", "fused_losses", "launch")
STUB = """#!/usr/bin/env bash
echo "$*${TRITON_INTERPRET:+ interpreted}" >> "$LOG"
case "$*" in *"$FAILING"*) echo "FAILED $FAILING::test_a"; exit "$STATUS" ;; esac
"""


@pytest.mark.parametrize(
    ("failing", "status", "expected"),
    [
        ("nothing", 0, 0),
        ("tests/test_kernels.py", 1, 1),
        ("bench/test_losses.py", 1, 1),
        ("bench/test_losses.py", 124, 0),  # as `timeout` ends when the time was up
    ],
)
def test_gpu_script_runs_every_part_whatever_fails(tmp_path, failing, status, expected):
    stub, log = tmp_path / "python", tmp_path / "log"
    stub.write_text(STUB)
    stub.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(stub), "LOG": str(log), "FAILING": failing}
    environment |= {"STATUS": str(status), "TRITON_INTERPRET": "1"}
    done = subprocess.run([ROOT / "bench/gpu.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == expected
    assert (f"FAILED {failing}::test_a" in done.stdout) == (failing != "nothing"), "what has failed is told"
    parts = re.findall(r"pip install|(?:tests|bench)/test_\w+|bench\.(?:report|profile)", log.read_text())
    benches = ("losses", "augment", "loop")
    after = [part for name in benches for part in (f"bench/test_{name}", "bench.report")]
    if status == 124:  # before there was anything to report
        after.remove("bench.report")
        assert "losses: the time was up before anything was measured" in done.stdout
    parts.remove("bench/test_losses")  # the first time it only compiles, beside the tests
    tests = [f"tests/test_{name}" for name in GPU_TESTS]
    assert parts == ["pip install", *tests, *after, "bench.profile"]
    assert log.read_text().count(" -k cuda\n") == len(benches) + 1, "what is measured on a GPU, and no more"
    assert "interpreted" not in log.read_text()


def test_gpu_script_runs_the_parts_it_is_told(tmp_path):
    stub, log = tmp_path / "python", tmp_path / "log"
    stub.write_text(STUB)
    stub.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(stub), "LOG": str(log), "FAILING": "nothing", "STATUS": "0"}
    script = ROOT / "bench/gpu.sh"
    assert subprocess.run([script, "augment", "profile"], env=environment).returncode == 0
    assert re.findall(r"(?:tests|bench)/test_\w+|bench\.profile", log.read_text()) == [
        "bench/test_augment",
        "bench.profile",
    ]
    unknown = subprocess.run([script, "loops"], env=environment, capture_output=True, text=True)
    assert unknown.returncode == 2
    assert "there is no part loops" in unknown.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_script_needs_a_gpu():
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([ROOT / "bench/gpu.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "torch sees no CUDA device" in done.stderr
