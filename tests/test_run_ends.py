"""How a run ends that cannot go on: divergence, too little room, interruption; and what it leaves."""

import errno
import io
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from commands import BARE, QUICK, command, files, parse
from safetensors import SafetensorError

from mim4dd import run
from mim4dd.commands import runner
from mim4dd.commands.checkpoint import Checkpoint
from mim4dd.commands.exits import guarded
from mim4dd.distill import Progress
from mim4dd.errors import InputError
from mim4dd.experiment import Experiment
from mim4dd.synthetic import SyntheticSet


@pytest.mark.parametrize("width", ["100000000", "2000000000"])  # as bytes, the second is no number of 64 bits
def test_too_little_memory_is_told(tmp_path, capsys, width):
    assert run.main([*QUICK, "--width", width, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mim4dd: out of memory (")
    assert "lower --memory-budget" in error


def test_memory_that_python_lacks_is_told(capsys):
    def too_much():
        raise MemoryError  # as Python's own: without a text

    assert guarded(too_much) == 1
    assert "mim4dd: out of memory (MemoryError); lower --memory-budget" in capsys.readouterr().err


def test_a_full_disk_is_told(capsys):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x")

    assert guarded(full) == 1
    assert "No space left on device: 'runs/x'); free some space" in capsys.readouterr().err

    def other():
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        guarded(other)


def test_a_disk_that_fills_while_tensors_are_written_is_told(capsys):
    def full():
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    assert guarded(full) == 1
    assert "a file could not be written (Error while" in capsys.readouterr().err


def test_divergence_exits_with_1_and_keeps_the_last_good_set(tmp_path, capsys):
    out = tmp_path / "out"
    assert run.main([*QUICK, "--iterations", "20", "--image-lr", "3e38", "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert "became" in error or "not finite" in error
    assert "the last good set, of iteration" in error
    assert SyntheticSet.load(out / "synthetic.safetensors").images.isfinite().all()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interruption_keeps_the_last_good_set(tmp_path, sent):
    process = subprocess.Popen(
        [sys.executable, "-m", "mim4dd.run", *BARE, "--iterations", "1000", "--out", "out"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As from a terminal: what runs in the background may ignore the signal, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert any(line.startswith("distil ") for line in iter(process.stdout.readline, ""))  # a tenth is done
    process.send_signal(sent)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "the last good set, of iteration" in error
    assert len(SyntheticSet.load(tmp_path / "out" / "synthetic.safetensors")) == 10


def test_a_second_signal_does_not_interrupt_the_saving():
    saved, before = [], signal.getsignal(signal.SIGTERM)

    def interrupted():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGTERM)
            saved.append(True)
            raise

    assert guarded(interrupted) == 130
    assert saved
    assert signal.getsignal(signal.SIGTERM) is before


def test_short_memory_keeps_the_last_good_set(tmp_path, monkeypatch, capsys):
    look = runner.Recorder.__call__

    def full(recorder, progress):
        look(recorder, progress)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runner.Recorder, "__call__", full)
    out = tmp_path / "out"
    assert run.main(["--quick", "--iterations", "20", "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert "the last good set, of iteration 10, is in" in error
    assert "out of memory" in error
    assert f"to resume: python -m mim4dd.run --resume {out}" in error, "with another --memory-budget"
    assert SyntheticSet.load(out / "synthetic.safetensors").metadata["iterations"] == 10


def test_a_set_in_the_making_is_saved_every_minute_and_says_how_far_it_is(tmp_path, monkeypatch):
    seconds = [100.0]
    monkeypatch.setattr("mim4dd.commands.runner.time.monotonic", lambda: seconds[0])
    experiment = Experiment.prepare(parse(["--quick", "--iterations", "500", "--device", "cpu"]))
    path = tmp_path / "synthetic.safetensors"
    recorder = runner.Recorder(experiment, tmp_path)
    saved = []
    for iteration, seconds[0] in ((10, 159), (20, 161), (30, 220), (40, 222)):
        images = experiment.start.images + iteration
        synthetic = replace(experiment.start, images=images)
        recorder(Progress(iteration, {"base": 1.0}, synthetic, {"images": images}))
        if path.exists():
            made = SyntheticSet.load(path)
            saved.append(made.metadata["iterations"])
            assert torch.equal(made.images, experiment.start.images + saved[-1])
            found = Checkpoint.load(tmp_path)
            assert found.iteration == saved[-1]
            assert torch.equal(found.state["images"], made.images)
    assert saved == [20, 20, 40]
    assert made.metadata["config"]["distill"]["iterations"] == 500


def test_a_run_whose_output_nobody_reads_any_more_keeps_what_it_has(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "mim4dd.run", *BARE, "--iterations", "300", "--out", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert any(line.startswith("distil ") for line in iter(process.stdout.readline, ""))
    process.stdout.close()  # as `| head` does
    error = process.stderr.read()
    assert process.wait(timeout=60) == 141
    assert "the last good set, of iteration" in error
    assert "to resume: python -m mim4dd.run --resume" in error
    assert files(tmp_path / "out") == ["state.safetensors", "synthetic.safetensors"]


def test_output_without_unicode_or_none_at_all_does_not_end_a_run(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = command(*BARE, "--num-eval", "2", "--out", str(tmp_path / "ascii"), env=environment)
    assert done.returncode == 0, done.stderr
    assert " ? " in done.stdout, "for the plus-minus"
    shell = f"{sys.executable} -m mim4dd.run {' '.join(BARE)} --out {tmp_path}/closed >&-"
    done = subprocess.run(shell, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_message_that_cannot_be_written_leaves_the_exit_code(monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    def refuse():
        raise InputError("it is wrong")

    for stream in (None, Full()):  # the first is closed, as by 2>&-
        monkeypatch.setattr(sys, "stderr", stream)
        assert guarded(refuse) == 2


def test_output_that_nobody_reads_ends_quietly():
    process = subprocess.Popen(
        [sys.executable, "-m", "mim4dd.run", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()  # what `| head` does when it has seen enough
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141
