"""The benches: what they compare is equal, and what they print adds up. Nothing is timed here."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import baselines, growth, measure, profile, report, steps, test_augment, test_losses
from bench.test_loop import (
    comparable,
    float32_convolutions,
    small,
    test_matching_is_that_of_the_textbook,
    test_the_trained_network_is_that_of_the_textbook,
    test_trajectory_matching_is_that_of_the_textbook,
)
from mim4dd import augment, distill, extension, graph, networks
from mim4dd.objectives import METHODS
from mim4dd.seeding import generator

__all__ = [
    "comparable",
    "float32_convolutions",
    "small",
    "test_matching_is_that_of_the_textbook",
    "test_the_trained_network_is_that_of_the_textbook",
    "test_trajectory_matching_is_that_of_the_textbook",
]

ROOT = Path(__file__).parent.parent


class Given:
    """In the place of `baselines.Draw`: returns given numbers, if they could have been drawn."""

    def __init__(self, *numbers):
        self.numbers = iter(numbers)

    def integers(self, low, high):
        drawn = next(self.numbers)
        assert low <= drawn.min()
        assert drawn.max() < high
        return drawn

    def uniform(self):
        drawn = next(self.numbers)
        assert drawn.min() >= -1e-6
        assert drawn.max() <= 1 + 1e-6
        return drawn


@pytest.mark.parametrize("op", baselines.OPS)
def test_the_textbook_augments_as_ours_does(op, generator):
    x = torch.randn(200, 3, 32, 32, generator=generator)
    given = augment.sample(op, len(x), 32, generator=generator, mode="all")
    top, bottom, left, right = given.cutout.T  # of a box of 16, by the edge that was not clamped
    centres = [torch.where(low > 0, low + 8, high - 7) for low, high in ((top, bottom), (left, right))]
    numbers = {
        "color": [given.brightness + 0.5, given.saturation / 2, given.contrast - 0.5],
        "crop": [given.shift_y, given.shift_x],
        "cutout": centres,
        "flip": [1 - given.flip.float()],
        "scale": [(factor - 1 / 1.2) / (1.2 - 1 / 1.2) for factor in (given.scale_x, given.scale_y)],
        "rotate": [given.degrees / 30 + 0.5],
    }
    textbook = baselines.OPS[op](x, Given(*numbers[op]))
    torch.testing.assert_close(textbook, augment.apply(x, given), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", test_augment.OPS)
def test_what_the_textbook_draws_differs_between_images_unless_it_is_seeded(op):
    x = torch.rand(1, 3, 16, 16).expand(20, -1, -1, -1)
    assert (test_augment.textbook(op, x).std(0) > 0).any()
    if op != "all":
        alike = baselines.augmented(x, op, seed=0)
        assert torch.equal(alike, alike[:1].expand_as(x))
        assert torch.equal(alike, baselines.augmented(x, op, seed=0))


@pytest.mark.parametrize("step", steps.OURS)
def test_every_step_of_the_loop_runs(step, small, monkeypatch):
    for name, value in {"TEST": 50, "NETWORKS": 1, "EPOCHS": {"cpu": 1}, "STEPS": 2}.items():
        monkeypatch.setattr(steps, name, value)
    for versions in (steps.OURS, steps.TEXTBOOK):
        versions[step](*small("cpu"))()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("method", METHODS)
def test_growth_is_measured_for_every_method(method):
    sizes = {"ipc": 2, "classes": 3, "side": 28, "real_batch": 4}
    taken, mebibytes = growth.measure(method, 32, sizes)
    assert taken > 0
    assert mebibytes >= 0, "none where the process had as much before"


MATCHED_FEATURES = {"forward real", "forward synthetic", "augmentation", "initialise"}
MATCHED_GRADIENTS = {"gradients real", "gradients synthetic", "augmentation", "inner loop"}
PARTS = {
    "dm": MATCHED_FEATURES,
    "ncfm": MATCHED_FEATURES,
    "dc": MATCHED_GRADIENTS,
    "dsa": MATCHED_GRADIENTS,
    "mtt": {"experts", "augmentation", "student steps", "student steps again"},
}


@pytest.mark.parametrize("method", METHODS)
def test_the_profile_names_the_parts(method, monkeypatch, capsys, tmp_path):
    trace = tmp_path / "trace.json"
    options = "--width 8 --real-batch 8 --ipc 2 --iterations 1 --device cpu --precision fp32"
    command = ["profile", "--method", method, *options.split(), "--trace", str(trace)]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setattr(profile, "matrix_rate", lambda *_: 1e10)
    trajectory = profile.problems.trajectory
    monkeypatch.setattr(
        profile.problems, "trajectory", lambda folder, **_: trajectory(folder, student_steps=2)
    )
    profile.main()
    printed = capsys.readouterr().out
    lines = re.findall(r"^([a-z ]+?) +[\d.]+ ms +(\d+)%", printed, re.MULTILINE)
    shares = {part: int(share) for part, share in lines}
    assert PARTS[method] | {"backward", "loss", "update"} <= {*shares}
    assert shares["rest"] < 40
    assert re.search(r"[\d.]+ GFLOP/s, \d+% of the 10 GFLOP/s of a square fp32 product", printed)
    assert all(part in trace.read_text() for part in PARTS[method])
    assert profile.augment.apply.__name__ == "apply", "the names are taken off again"


def test_the_profile_sees_the_parts_of_every_iteration_where_they_are_replayed(monkeypatch, tmp_path):
    monkeypatch.setattr(distill, "replayed", graph.Replayed)
    monkeypatch.setattr(graph, "_aside", lambda step, inputs, _: step(*inputs))
    monkeypatch.setattr(graph, "_record", lambda *_: lambda: torch.zeros(1))  # nothing of it is seen
    trace = tmp_path / "trace.json"
    options = f"--width 8 --real-batch 8 --iterations 3 --device cpu --precision fp32 --trace {trace}"
    monkeypatch.setattr("sys.argv", ["profile", *options.split()])
    monkeypatch.setattr(profile, "matrix_rate", lambda *_: 1e10)
    profile.main()
    names = [event["name"] for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("forward synthetic") == names.count("update") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--iterations 0", "--iterations: 0, expected at least 1"),
        ("--device toaster", "--device toaster is not available here"),
        ("--trace missing/trace.json", "No such file or directory"),
    ],
)
def test_the_profile_refuses_bad_options(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["profile", *arguments.split()])
    with pytest.raises(SystemExit, match="2"):
        profile.main()
    assert message in capsys.readouterr().err


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


def bench_run(folder, *arguments):
    """Run pytest with the settings of the benches; returns what it wrote."""
    path = folder / "measured.json"
    command = [sys.executable, "-m", "pytest", *arguments, "--benchmark-enable", f"--benchmark-json={path}"]
    # Where these tests run side by side: what they start does not.
    alone = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)
    assert path.stat().st_size, done.stdout + done.stderr
    return path, done


def reported(monkeypatch, folder, *paths):
    """The page and the JSON that bench.report makes of what pytest-benchmark wrote."""
    monkeypatch.setattr(report, "RESULTS", folder / "results")
    monkeypatch.setattr("sys.argv", ["report", *map(str, paths)])
    report.main()
    (page,) = (folder / "results").glob("*.md")
    return page.read_text(), json.loads(page.with_suffix(".json").read_text()), page.name


def test_a_case_of_the_losses_from_measuring_to_the_table(monkeypatch, tmp_path):
    path, done = bench_run(tmp_path, "bench/test_losses.py", "-k", "cpu and 10x640")
    assert done.returncode == 0, done.stdout
    page, result, name = reported(monkeypatch, tmp_path, path)
    assert re.fullmatch(r"losses-.+-cpu-\d+-threads.md", name)
    number = r"[\d.]+"
    for variant in ("chunked", "eager"):
        about = rf"nce \| 10 \| 640 \| 512 \| float32 \| anchors \| {variant}"
        assert re.search(rf"\| {about} \| {number} \| {number}% \| {number} \|", page)
    assert re.search(rf"float32 products at {number} TFLOP/s, copy at {number} GB/s", page)
    (case,), ceiling = result["cases"].values(), result["ceilings"]["float32"]
    least = max(2 * 2 * 10 * 640 * 512 / ceiling["matrix_rate"], 4 * 660 * 512 / ceiling["copy_rate"])
    measured = case["variants"]["chunked"]
    assert measured["of_floor"] == pytest.approx(1e3 * least / measured["milliseconds"], rel=1e-2)


def test_a_run_that_is_cut_off_keeps_what_it_measured(monkeypatch, tmp_path):
    (tmp_path / "conftest.py").write_text((ROOT / "bench" / "conftest.py").read_text())
    (tmp_path / "test_loop.py").write_text("""
import os, signal, pytest

@pytest.mark.parametrize("step", ["first", "absent", "cut", "last"])
@pytest.mark.parametrize("device", ["cpu"])
def test_loop(benchmark, device, step):
    if step == "absent":
        pytest.skip("there is no such thing")
    rounds = []
    def call():
        rounds.append(1)
        if step == "cut" and len(rounds) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
    benchmark.pedantic(call, rounds=5)
    benchmark.extra_info["seconds"] = {"fp32": benchmark.stats.stats.median}
""")
    path, done = bench_run(tmp_path, f"--rootdir={tmp_path}", str(tmp_path / "test_loop.py"))
    assert done.returncode == 2, done.stdout
    page, result, _ = reported(monkeypatch, tmp_path, path)
    assert [*result["cases"]] == ["first"]
    assert "Not measured (there is no such thing): absent." in page
    assert "Not measured (the time was up): cut, last." in page


def test_what_a_variant_lacks_is_named_in_the_table():
    measured = {"milliseconds": 1.5, "of_floor": 0.5, "extra_peak_mib": 3.0}
    on_gpu = {"launches": 4, "replayed_milliseconds": None}
    case = {"device": "cuda", "loss": "nce", "m": 9, "n": 9, "widths": [4, 2], "dtype": "bfloat16"}
    case |= {"gradients": "both"}
    case |= {"left_out": {"eager": "does not fit in memory"}, "variants": {"fused": measured | on_gpu}}
    page = [*report._losses({"case": case}, {})]
    assert "| nce | 9 | 9 | 4 + 2 | bfloat16 | both | fused | 1.500 | 50% | 3 | 4 |  |" in page
    assert "| nce | 9 | 9 | 4 + 2 | bfloat16 | both | eager | does not fit in memory |  |  |  |  |" in page


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_chunks_need_less_than_a_tenth_of_the_memory_of_the_formula():
    calls = test_losses.steps(test_losses.Case("cpu", 4096, 4096, (128,), "float32", "both"))
    peaks = {name: measure.extra_peak(call, "cpu") for name, call in calls.items()}
    assert peaks["chunked"] < peaks["eager"] / 10


def loop_report(**steps):
    """What a run of the loop's bench writes, of the times of some steps."""
    return {
        "benchmarks": [
            {"fullname": f"bench/test_loop.py::test_loop[cpu-{step}]", "extra_info": {"seconds": times}}
            for step, times in steps.items()
        ],
        "without_time": {
            f"bench/test_loop.py::test_loop[cpu-{step}]": "the time was up"
            for step in {"dm", "dc"} - {*steps}
        },
        "datetime": "2026-01-02T03",
        "machine_info": {
            "versions": {"torch": "2", "triton": None, "mim4dd": "1"},
            "devices": {"cpu": {"device": "X, 2 threads", "file": "x-cpu-2-threads"}},
        },
    }


def test_the_table_of_the_loop_gives_ratios_to_the_textbook(monkeypatch, tmp_path):
    paths = [tmp_path / "first.json", tmp_path / "second.json"]
    times = {"textbook": 3.0, "fp32": 1.5}
    for path, step in zip(paths, ("dm", "dc"), strict=True):
        path.write_text(json.dumps(loop_report(**{step: times})))
    page, result, name = reported(monkeypatch, tmp_path, *paths)
    assert name == "loop-x-cpu-2-threads.md"
    assert "| dm | 3.000 | 1.500 (2.0x) |" in page
    assert result["without_time"] == {}


@pytest.mark.parametrize(("alone", "share"), [({}, 20), ({"op": 0.001}, 50)])
def test_copying_is_beside_the_op_alone_where_that_was_measured(alone, share):
    times = {"fused": 0.0025, "textbook": 0.01, **alone, "copy": 0.0005}
    *_, row = report._versions({"flip": times}, 1e3)
    assert f" ({share}%) |" in row


def test_the_reporter_says_what_it_expects(monkeypatch, tmp_path, capsys):
    path = tmp_path / "empty.json"
    path.touch()
    monkeypatch.setattr("sys.argv", ["report", str(path)])
    with pytest.raises(SystemExit) as stopped:
        report.main()
    assert stopped.value.code == 2
    assert f"{path}: expected what --benchmark-json of a bench here writes" in capsys.readouterr().err
