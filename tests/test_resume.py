"""An interrupted run is resumed, and ends as an uninterrupted one does."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from commands import QUICK, files, npz, parse
from conftest import digits_problem

from mim4dd import compare, distill, run, teacher
from mim4dd.commands import checkpoint, runner
from mim4dd.errors import InputError
from mim4dd.experiment import Experiment
from mim4dd.objectives import Matched, Objective, gradient, term_networks
from mim4dd.synthetic import SyntheticSet

RUN = ["--quick", "--iterations", "14", "--eval-epochs", "2"]  # looked at after 10 and 14


@pytest.fixture
def short_trainings(monkeypatch):
    """A student every 4 matches, a network of gradient matching every 4 image steps, a hasty teacher."""
    monkeypatch.setattr(term_networks, "STUDENT_EVERY", 4)
    monkeypatch.setattr(term_networks, "STUDENT_EPOCHS", (2, 5))
    monkeypatch.setattr(term_networks, "REAL_STEPS", 10)
    monkeypatch.setattr(gradient, "loops", lambda ipc: (4, 2))
    monkeypatch.setattr(teacher, "STEPS", 20)


@pytest.mark.parametrize(
    "options",
    [
        "--mim-weight 0",
        "--mim-networks synthetic",
        "--mim-networks real",
        "--mim-loss nce --mim-networks base --mim-projection trained",
        "--factor 2 --image-momentum 0",
        "--method dc --mim-weight 0 --ipc 2",
        "--method dsa --ipc 2 --soft-labels",
        "--method dsa --network convnet-bn",
        "--method mtt --student-batch 6 --mim-weight 1 --soft-labels",
        "--method ncfm --soft-labels",
    ],
)
def test_the_rest_of_a_run_is_what_it_would_have_been(tmp_path, short_trainings, options):
    def distilled(**from_there):
        looks = []
        experiment = Experiment.prepare(parse([*RUN, "--experts", str(tmp_path), *options.split()]))
        return experiment.distill(looks.append, **from_there), looks

    whole, (first, last) = distilled()
    rest, (only,) = distilled(state=first.state)
    assert torch.equal(rest.images, whole.images)
    assert torch.equal(rest.targets, whole.targets)
    assert rest.network_lr == whole.network_lr
    assert (only.iteration, only.terms) == (last.iteration, last.terms)
    assert only.state.keys() == last.state.keys()
    assert all(torch.equal(only.state[name], value) for name, value in last.state.items())
    assert not torch.equal(whole.images, first.synthetic.images)


look = runner.Recorder.__call__


@pytest.fixture
def cut_off_after_10(monkeypatch):
    """Runs that are interrupted at their first look, until undone."""

    def interrupt(keeper, progress):
        look(keeper, progress)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.Recorder, "__call__", interrupt)
    return monkeypatch


@pytest.fixture
def updates(monkeypatch):
    """A list that grows with every update of the images."""
    done, update = [], distill.Distillation.update

    def counted(distillation):
        done.append(distillation)
        return update(distillation)

    monkeypatch.setattr(distill.Distillation, "update", counted)
    return done


@pytest.fixture
def cut_off(tmp_path, short_trainings, cut_off_after_10, capsys):
    """The folder of a run that was."""
    out = tmp_path / "out"
    assert run.main([*RUN, "--out", str(out)]) == 130
    assert files(out) == ["state.safetensors", "synthetic.safetensors"]
    assert f"mim4dd: to resume: python -m mim4dd.run --resume {out}\n" in capsys.readouterr().err
    cut_off_after_10.setattr(runner.Recorder, "__call__", look)
    return out


def test_a_run_is_resumed_by_its_folder(cut_off, tmp_path, capsys):
    assert run.main(["--resume", str(cut_off)]) == 0
    assert "10 of 14 updates are done already" in capsys.readouterr().out
    whole = tmp_path / "whole"
    assert run.main([*RUN, "--out", str(whole)]) == 0
    assert files(cut_off) == files(whole), "nothing is left to resume"
    results = [json.loads((folder / "result.json").read_text()) for folder in (cut_off, whole)]
    for result in results:
        del result["seconds"]
        assert result["config"].pop("out")
    assert results[0] == results[1]
    ours, expected = (SyntheticSet.load(folder / "synthetic.safetensors") for folder in (cut_off, whole))
    assert torch.equal(ours.images, expected.images)


def test_its_time_goes_on_too(cut_off):
    state = checkpoint.Checkpoint.load(cut_off)
    assert state.seconds > 0
    dataclasses.replace(state, seconds=1000.0).save(cut_off)
    assert run.main(["--resume", str(cut_off)]) == 0
    seconds = json.loads((cut_off / "result.json").read_text())["seconds"]
    assert seconds["distill"] >= 1000
    assert seconds["evaluate"] < 1000, "its own"


def test_a_resumed_run_takes_the_memory_it_is_given(cut_off, monkeypatch):
    asked, prepare = [], Experiment.prepare
    monkeypatch.setattr(Experiment, "prepare", lambda c, _: asked.append(c.memory_budget) or prepare(c))
    assert run.main(["--resume", str(cut_off), "--memory-budget", "2.5"]) == 0
    assert asked == [2.5]


def test_cut_off_again_before_a_look_it_is_as_before(cut_off, monkeypatch, capsys):
    before = {name: (cut_off / name).read_bytes() for name in files(cut_off)}

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(distill.Distillation, "update", interrupt)
    assert run.main(["--resume", str(cut_off)]) == 130
    assert "the last good set, of iteration 10, is in" in capsys.readouterr().err
    assert {name: (cut_off / name).read_bytes() for name in files(cut_off)} == before


def test_a_run_cut_off_in_its_evaluation_is_not_distilled_again(tmp_path, monkeypatch, updates, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    out = str(tmp_path / "out")
    with monkeypatch.context() as here:
        here.setattr(runner, "evaluations", interrupt)
        assert run.main([*RUN, "--mim-weight", "0", "--out", out]) == 130
    assert f"to resume: python -m mim4dd.run --resume {out}" in capsys.readouterr().err
    assert len(updates) == 14
    assert run.main(["--resume", out]) == 0
    assert len(updates) == 14
    assert json.loads((tmp_path / "out" / "result.json").read_text())["iterations"] == 14


def test_a_cell_of_a_comparison_goes_on_where_it_was_cut_off(tmp_path, updates, cut_off_after_10, capsys):
    comparison = [*RUN, "--mim-weights", "0", "--seeds", "0", "--out", str(tmp_path)]
    assert compare.main(comparison) == 130
    error = capsys.readouterr().err
    assert "run the same command again to continue" in error
    assert "--resume" not in error
    cut_off_after_10.setattr(runner.Recorder, "__call__", look)
    assert compare.main(comparison) == 0
    assert len(updates) == 14
    result = json.loads((tmp_path / "cells" / "dm-w0-ipc1-seed0" / "result.json").read_text())
    assert [look["iteration"] for look in result["history"]] == [10, 14]


def refused(folder, capsys, *options):
    assert run.main(["--resume", str(folder), *options]) == 2
    return capsys.readouterr().err


def test_what_cannot_be_resumed_is_refused(cut_off, tmp_path, capsys):
    for option in ("--iterations=20", "--method=dm", "--soft_labels"):  # one is the default
        name = option.split("=")[0].replace("_", "-")
        assert f"uses the settings of that run; leave out {name}\n" in refused(cut_off, capsys, option)
    assert "--memory-budget is -1.0, expected a positive" in refused(cut_off, capsys, "--memory-budget", "-1")
    assert "holds no state.safetensors: no run was interrupted there" in refused(tmp_path, capsys)
    assert "there is no such folder" in refused(tmp_path / "nowhere", capsys)
    path = cut_off / "state.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert "cannot be read" in refused(cut_off, capsys)
    path.write_bytes(whole.replace(b"mim4dd-state-1", b"mim4dd-state-0"))
    assert "is of another version of mim4dd" in refused(cut_off, capsys)
    path.write_bytes(whole)
    assert run.main(["--resume", str(path), "--memory-budget", "1"]) == 0
    capsys.readouterr()
    assert "that run is finished" in refused(cut_off, capsys)


def test_a_state_of_another_release_is_refused(tmp_path, monkeypatch):
    state = checkpoint.Checkpoint(parse(QUICK), "", 1, 1.0, [], {})
    state.save(tmp_path)
    assert checkpoint.Checkpoint.load(tmp_path) == state
    monkeypatch.setattr(checkpoint, "__version__", "99.0")
    with pytest.raises(InputError, match="is of another version of mim4dd"):
        checkpoint.Checkpoint.load(tmp_path)


@pytest.mark.usefixtures("short_trainings")
@pytest.mark.parametrize("change", ["missing", "more", "of a GPU"])
def test_a_state_of_something_else_is_refused(change):
    looks = []
    config = parse([*QUICK, "--iterations", "10"])
    Experiment.prepare(config).distill(looks.append)
    (state,) = (look.state for look in looks)
    name = "objective.base.generator 0"
    if change == "missing":
        del state[name]
    elif change == "more":
        name = "objective.network"
        state[name] = torch.zeros(1)
    else:
        state[name] = state[name][:16]  # a GPU's generators have so many bytes
    with pytest.raises(InputError, match=rf"does not match .* \(entry '{name}'\)"):
        Experiment.prepare(config).distill(looks.append, state=state)


def test_a_cell_whose_state_is_damaged_starts_again(tmp_path, updates, cut_off_after_10, capsys):
    comparison = [*RUN, "--mim-weights", "0", "--seeds", "0", "--baselines", "--out", str(tmp_path)]
    assert compare.main(comparison) == 130
    (tmp_path / "cells" / "dm-w0-ipc1-seed0" / "state.safetensors").write_bytes(b"")
    cut_off_after_10.setattr(runner.Recorder, "__call__", look)
    assert compare.main(comparison) == 0
    assert "; the run starts over" in capsys.readouterr().err
    assert len(updates) == 10 + 14


def test_a_run_is_resumed_from_anywhere_but_only_on_its_data(tmp_path, cut_off_after_10, capsys):
    for name in ("there", "elsewhere"):
        (tmp_path / name).mkdir()
    npz(tmp_path / "there" / "data.npz")
    cut_off_after_10.chdir(tmp_path / "there")
    assert run.main([*RUN, "--mim-weight", "0", "--dataset", "data.npz", "--out", "out"]) == 130
    cut_off_after_10.setattr(runner.Recorder, "__call__", look)
    cut_off_after_10.chdir(tmp_path / "elsewhere")
    npz(tmp_path / "there" / "data.npz", x_train=np.full((40, 12, 12, 3), 7, np.uint8))
    assert "data.npz differ from those of the run in" in refused("../there/out", capsys)
    npz(tmp_path / "there" / "data.npz")
    assert run.main(["--resume", "../there/out"]) == 0


def test_paths_of_a_state_mean_the_same_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse([*QUICK, "--dataset", "set", "--data-dir", "data", "--experts", "experts"])
    checkpoint.Checkpoint(config, "", 1, 1.0, [], {}).save(tmp_path)
    found = checkpoint.Checkpoint.load(tmp_path).config
    assert found.data.dataset == str(tmp_path / "set")
    assert found.data.data_dir == tmp_path / "data"
    assert found.trajectory.experts == tmp_path / "experts"


def test_what_is_overwritten_is_not_gone_on_with(cut_off, monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Experiment, "prepare_term", interrupt)
    assert run.main([*RUN, "--seed", "7", "--out", str(cut_off), "--overwrite"]) == 130
    assert "--resume" not in capsys.readouterr().err


def test_after_a_divergence_there_is_nothing_to_go_on_with(cut_off, monkeypatch, capsys):
    def diverge(*_):
        raise distill.DivergenceError("the base term became nan")

    before = SyntheticSet.load(cut_off / "synthetic.safetensors").images
    monkeypatch.setattr(distill, "_read", diverge)
    assert run.main(["--resume", str(cut_off)]) == 1
    assert "--resume" not in capsys.readouterr().err
    assert files(cut_off) == ["synthetic.safetensors"]
    assert torch.equal(SyntheticSet.load(cut_off / "synthetic.safetensors").images, before)


def test_an_objective_without_a_state_cannot_be_resumed():
    class Silent(Objective):
        def match(self, images, targets):
            rows = images.flatten(1)
            return Matched(rows.square().sum(), [rows], [rows.detach()], targets, targets)

    _, start = digits_problem()
    looks = []
    settings = {"iterations": 10, "lr": 1e-4, "momentum": 0.0}
    distill.distill(Silent(), start, on_progress=looks.append, **settings)
    assert looks[0].state is None
    with pytest.raises(InputError, match="this objective cannot be resumed"):
        distill.distill(Silent(), start, state={}, **settings)
