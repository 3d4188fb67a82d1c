"""Before a run does any work: what it refuses, and which folder it takes or overwrites."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import BARE, QUICK, command, files, npz, parse
from conftest import write_pictures
from rich.console import Console

from mim4dd import evaluate, run
from mim4dd.commands import runner
from mim4dd.experiment import Experiment
from mim4dd.files import LOCK, cache_folder, exclusive
from mim4dd.synthetic import SyntheticSet


def test_results_are_never_overwritten_silently(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run.main(BARE) == 0
    assert files(tmp_path / "runs") == ["digits-dm-ipc1-0", "digits-dm-ipc1-0-2"]
    named = [*BARE, "--out", "runs/digits-dm-ipc1-0"]
    before = (tmp_path / "runs/digits-dm-ipc1-0/result.json").read_bytes()
    assert run.main([*named, "--seed", "5"]) == 2
    assert "is not empty; give another folder, or --overwrite" in capsys.readouterr().err
    assert (tmp_path / "runs/digits-dm-ipc1-0/result.json").read_bytes() == before
    assert run.main([*named, "--seed", "5", "--overwrite"]) == 0
    assert (tmp_path / "runs/digits-dm-ipc1-0/result.json").read_bytes() != before
    folder = tmp_path / "runs" / "digits-dm-ipc1-0"
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    assert run.main([*named, "--iterations", "20", "--image-lr", "3e38", "--overwrite"]) == 1
    assert "still holds the earlier results" in capsys.readouterr().err
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before
    look = runner.Recorder.__call__

    def interrupt(recorder, progress):
        look(recorder, progress)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.Recorder, "__call__", interrupt)
    assert run.main([*named, "--iterations", "20", "--overwrite"]) == 130
    assert files(folder) == ["state.safetensors", "synthetic.safetensors"], "nothing tells of another set"
    assert run.main(named) == 2
    assert "give another folder, --resume runs/digits-dm-ipc1-0, or" in capsys.readouterr().err
    interrupted = {name: (folder / name).read_bytes() for name in files(folder)}
    assert run.main([*named, "--iterations", "20", "--image-lr", "3e38", "--overwrite"]) == 1
    assert {name: (folder / name).read_bytes() for name in files(folder)} == interrupted, "still to resume"


def test_a_full_disk_keeps_what_was_to_be_overwritten(tmp_path, monkeypatch, capsys):
    arguments = [*BARE, "--out", str(tmp_path / "out")]
    assert run.main(arguments) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(synthetic, path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(SyntheticSet, "save", full)
    assert run.main([*arguments, "--seed", "5", "--overwrite"]) == 1
    assert "files saved earlier are unchanged" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_terminal_shows_what_is_waited_for(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    shown = io.StringIO()
    monkeypatch.setattr(runner, "console", Console(file=shown, force_terminal=True))
    runner.prepared_experiment(parse([*QUICK]))
    assert "reading the images" in shown.getvalue()


def test_two_runs_at_once_get_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment = Experiment.prepare(parse([*QUICK]))
    assert [run.open_folder(experiment).name for _ in range(2)] == ["digits-dm-ipc1-0", "digits-dm-ipc1-0-2"]


def test_without_a_folder_the_usual_one_is_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run.main([*BARE, "--overwrite"]) == 0
    assert files(tmp_path / "runs") == ["digits-dm-ipc1-0"]


def test_a_folder_is_free_once_a_run_that_saved_nothing_was_killed_in_it(tmp_path, capsys):
    arguments = [*BARE, "--out", str(tmp_path)]
    with exclusive(tmp_path):
        assert run.main(arguments) == 2
    assert f"another process is running in {tmp_path}" in capsys.readouterr().err
    killed = "import os; from mim4dd.commands import runner; runner.introduce = lambda *_: os._exit(9)"
    run_it = f"{killed}; from mim4dd import run; run.main({arguments})"
    assert subprocess.run([sys.executable, "-c", run_it]).returncode == 9
    assert files(tmp_path) == [LOCK]
    assert run.main(arguments) == 0
    assert LOCK not in files(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "digts"], "unknown data set 'digts', did you mean digits"),
        (["--method", "dn"], "unknown method 'dn', did you mean dm"),
        (["--dataset", "mnist", "--data-dir", "nowhere"], "not found in nowhere"),
        (["--dataset", "./nothing.npz"], "no such file or folder"),
        (["--ipc", "0"], "--ipc is 0, expected a number of at least 1"),
        (["--num-eval", "9" * 20], "--num-eval is 99999999999999999999, expected a number of at least 0 and"),
        (["--image-size", "9" * 20], "--image-size is 99999999999999999999, expected a number"),
        (["--out", "~nobody-at-all/x"], "~nobody-at-all/x: there is no such user"),
        (["--dataset", "~nobody-at-all"], "~nobody-at-all: there is no such user"),
        (["--method", "mtt", "--experts", "~nobody-at-all"], "~nobody-at-all: there is no such user"),
        (["--out", "x" * 300], "File name too long"),
        (["--dataset", "x" * 300], "File name too long"),
        (["--out", os.fsdecode(b"caf\xe9")], "is not UTF-8; give another"),
        (["--factor", "3"], "--factor 3 does not divide images of 8x8"),
        (["--ipc", "1000"], "fewer than the 1000 asked for"),
        (["--ipc", "1000", "--mim-pairs", "cluster"], "fewer than the 1000 asked for"),
        (["--dataset", ""], "--dataset is empty, expected a name or a path"),
        (["--device", "cuda"], "--device cuda is not available here"),
        (["--device", "toaster"], "--device toaster is not available here"),
        (["--device", "meta"], "--device meta is not available here"),
        (["--mim-layers", "0,7"], "there is no layer 7, the network has 2"),
        (["--mim-layers", "7", "--mim-weight", "0"], "there is no layer 7, the network has 2"),
        (
            ["--eval-archs", "mlp,resnet"],
            "unknown architecture in --eval-archs: 'resnet', did you mean resnet18",
        ),
        (["--config", "missing.json"], "--config missing.json cannot be read"),
        (["--num-eval", "0", "--eval-archs", "mlp"], "--eval-archs needs --num-eval of at least 1, got 0"),
        (["--baselines", "base", "--mim-weight", "0"], "--baselines base is the run itself"),
    ],
)
def test_bad_input_exits_with_2_and_writes_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.chdir(tmp_path)
    assert run.main([*QUICK, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) <= 2
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_train": np.zeros(40, int), "y_test": np.zeros(8, int)}, "one class, expected two"),
        ({"x_train": np.full((40, 12, 12, 3), 1e300)}, "NaN, infinite or huge values"),
    ],
)
def test_bad_data_exit_with_2(tmp_path, capsys, changes, message):
    path = npz(tmp_path / "data.npz", **changes)
    assert run.main([*QUICK, "--dataset", path, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unwritable_out(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert run.main([*QUICK, "--out", str(tmp_path / "file" / "below")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert run.main([*QUICK, "--out", str(tmp_path / "file"), "--overwrite"]) == 2
    assert "file is a file; give a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_the_name_of_the_data_may_be_any(tmp_path, monkeypatch):
    """Also one in another encoding, which no result can hold."""
    data = Path(os.fsdecode(b"caf\xe9"))
    monkeypatch.chdir(tmp_path)
    for name in ("cats", "dogs"):
        write_pictures(data / name, 5)
    assert run.main([*BARE, "--dataset", str(data)]) == 0
    folder = Path("runs") / "caf\ufffd-dm-ipc1-0"
    assert json.loads((folder / "result.json").read_text())["dataset"] == "caf\ufffd"
    assert evaluate.main([str(folder), "--num-eval", "1", "--eval-epochs", "1"]) == 0, "the data are found"


def test_out_is_not_to_become_a_class(tmp_path, monkeypatch, capsys):
    for name in ("cats", "dogs"):
        write_pictures(tmp_path / "data" / "pets" / name, 5)
    monkeypatch.chdir(tmp_path / "data" / "pets")
    assert run.main([*QUICK, "--dataset", "."]) == 2
    assert "--out runs lies in ., where it would count as a class" in capsys.readouterr().err
    assert files(tmp_path / "data" / "pets") == ["cats", "dogs"]
    out = str(tmp_path / "[old]")
    assert run.main([*BARE, "--dataset", ".", "--out", out]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("pets: 8 training images of 2 classes")
    assert f"Wrote synthetic.safetensors, result.json, images.png and report.html into {out}/" in printed
    monkeypatch.chdir(tmp_path)
    assert run.main([*QUICK, "--dataset", "data"]) == 2
    assert "all images are of one class 'pets', expected two or more" in capsys.readouterr().err


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    """Also where no shell expands it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MIM4DD_CACHE", "~/cache")
    assert cache_folder() == tmp_path / "cache"
    settings = parse([*QUICK, "--out=~/out", "--data-dir=~/data", "--experts=~/experts"])
    paths = settings.out, settings.data.data_dir, settings.trajectory.experts
    assert paths == (tmp_path / "out", tmp_path / "data", tmp_path / "experts")


def test_unknown_option_exits_with_2_without_traceback():
    done = command("--ipcs", "3")
    assert done.returncode == 2
    assert "--ipcs" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_that_saved_nothing_leaves_its_name_to_the_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def too_much(_):
        raise MemoryError

    monkeypatch.setattr(Experiment, "prepare_term", too_much)
    assert run.main(QUICK) == 1
    assert files(tmp_path / "runs") == []
