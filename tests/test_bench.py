"""The benches: what they compare is equal, and what they print adds up. Nothing is timed here."""

import json
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import loop_table, profile
from bench.test_loop import (
    comparable,
    float32_convolutions,
    small,
    test_matching_is_that_of_the_textbook,
    test_the_trained_network_is_that_of_the_textbook,
    test_trajectory_matching_is_that_of_the_textbook,
)
from mim4dd import extension, networks
from mim4dd.seeding import generator

__all__ = [
    "comparable",
    "float32_convolutions",
    "small",
    "test_matching_is_that_of_the_textbook",
    "test_the_trained_network_is_that_of_the_textbook",
    "test_trajectory_matching_is_that_of_the_textbook",
]


def test_the_profile_names_the_parts(monkeypatch, capsys, tmp_path):
    trace = tmp_path / "trace.json"
    options = "--method dm --width 8 --real-batch 8 --ipc 1 --iterations 1 --device cpu --precision fp32"
    monkeypatch.setattr("sys.argv", ["profile", *options.split(), "--trace", str(trace)])
    profile.main()
    printed = capsys.readouterr().out
    milliseconds = dict(re.findall(r"^([a-z ]+?) +([\d.]+) ms", printed, re.MULTILINE))
    assert {"forward real", "forward synthetic", "backward", "augmentation", "loss", "update"} <= {
        *milliseconds
    }
    assert re.search(r"[\d.]+ GFLOP/s, \d+% of the \d+ GFLOP/s of a square fp32 product", printed)
    assert "forward real" in trace.read_text()
    assert profile.distill.distill.__name__ == "distill"
    assert profile.augment.apply.__name__ == "apply", "the names are taken off again"


def test_the_profile_counts_the_operations_of_compiled_convolutions(monkeypatch):
    """As many as torch's own, which run in float64."""
    if not extension.available():
        pytest.skip("the extension is not built")
    network = networks.create("convnet", 1, 10, (28, 28), width=32)
    networks.initialise(network, generator(0, "flops"))
    counted = []
    for dtype in (torch.float32, torch.float64):
        network, images = network.to(dtype), torch.randn(2, 1, 28, 28, dtype=dtype, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            network(images).sum().backward()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


def test_the_table_gives_ratios_to_the_textbook(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(loop_table, "RESULTS", tmp_path)
    benchmarks = [
        {
            "params": {"device": "cpu", "step": "dm", "name": name},
            "stats": {"median": median},
            "extra_info": {"device": "cpu", "threads": 2, "torch": "2"},
        }
        for name, median in (("textbook", 3.0), ("fp32", 1.5))
    ]
    report = {
        "benchmarks": benchmarks,
        "datetime": "2026-01-02T03",
        "machine_info": {"cpu": {"brand_raw": "X"}},
    }
    path = tmp_path / "in.json"
    path.write_text(json.dumps(report))
    monkeypatch.setattr("sys.argv", ["loop_table", str(path)])
    loop_table.main()
    assert "| dm | 3.000 | 1.500 (2.0x) |" in capsys.readouterr().out
    assert len([*tmp_path.glob("loop-*-cpu-2-threads.*")]) == 2
