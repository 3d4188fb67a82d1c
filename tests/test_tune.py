"""Tuning: what is tried, what is found again, and what is said of it."""

import dataclasses
import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from commands import npz, parse

from mim4dd import compare, tune
from mim4dd.commands.options import read
from mim4dd.config import MimConfig
from mim4dd.data import load
from mim4dd.experiment import Experiment
from mim4dd.studies import cells, tune_report, tune_settings
from mim4dd.studies.tune_report import Trial, columns, ranked, table, verdict

QUICK = ["--quick", "--iterations", "2", "--eval-epochs", "1"]


def peak(config) -> float:
    """An accuracy that is best at weight 30 on the last layer; the base has 0.5, seeds are 0.01 apart."""
    mim = config.mim
    gain = 0.1 * math.exp(-((math.log10(mim.mim_weight / 30)) ** 2)) if mim.mim_weight else 0.05
    return 0.45 + gain + 0.01 * config.seed + 0.02 * (bool(mim.mim_weight) and mim.mim_layers == "last")


def test_the_base_starts_where_the_trials_do(tmp_path, scored):
    ran = scored(peak)
    arguments = ["--trials", "1", "--seeds", "0", "--mim-pairs", "cluster", "--init", "real"]
    assert tune.main([*QUICK, *arguments, "--out", str(tmp_path / "out")]) == 0
    assert [bool(config.mim.mim_weight) for config in ran] == [False, True]
    base, trial = (Experiment.prepare(config).start.images for config in ran)
    assert torch.equal(base, trial)


def test_the_command_that_confirms_can_be_pasted(tmp_path, scored):
    scored(lambda config: 0.6 if config.mim.mim_weight else 0.5)
    out = tmp_path / "my runs"
    assert tune.main([*QUICK, "--trials", "1", "--seeds", "0", "--out", str(out)]) == 0
    assert f"--config '{out}/tune.json' --out '{out}/confirm'" in (out / "tune.md").read_text()


def written(out):
    return json.loads((out / "tune.json").read_text())


def test_the_best_is_found_and_run_accepts_it(tmp_path, scored, capsys):
    ran = scored(peak)
    out = tmp_path / "out"
    arguments = ["--method", "dsa", "--ipc", "2", "--trials", "20", "--mim-symmetric", "--out", str(out)]
    assert tune.main([*QUICK, *arguments]) == 0
    found = written(out)["found"]
    trials = found["trials"]
    assert len(trials) == 21
    assert [config.mim.mim_weight for config in ran[:3]] == [0.0, 0.0, 0.0]
    assert trials[0]["accuracies"] == pytest.approx({"0": 0.5, "1": 0.51, "2": 0.52})
    assert {(c.distill.method, c.distill.ipc, c.data.validation) for c in ran} == {("dsa", 2, 0.1)}
    assert all(c.mim.mim_symmetric for c in ran[3:])
    complete = [trial for trial in trials if trial["complete"]]
    best = max(complete, key=lambda trial: trial["accuracies"]["0"])
    assert trials[found["best"]] == best
    assert best["accuracies"]["0"] > 0.56, "close to the peak of 0.57"
    assert best["mim"]["mim_layers"] == "last"
    study = tune.Search(read(tune.Tuning, "tune", [*QUICK, *arguments])).study
    assert study.best_trial.number == found["best"]
    assert study.best_value == pytest.approx(best["accuracies"]["0"] - 0.5)
    assert not found["within_noise"]
    accepted = parse(["--config", str(out / "tune.json")])
    assert vars(accepted.mim) == best["mim"]
    assert (accepted.distill.method, accepted.distill.ipc) == ("dsa", 2)
    assert (accepted.data.validation, accepted.distill.iterations, accepted.out) == (0.0, 2, None)
    printed = capsys.readouterr().out
    assert f"Trial {found['best']} is +" in printed
    command = (out / "tune.md").read_text().split("python -m mim4dd.compare ")[1].split("\n")[0]
    plan = compare.cells(read(compare.Comparison, "compare", command.split()))
    assert {seed for _, seed in plan} == {3, 4, 5, 6, 7}, "those searched are 0, 1 and 2"
    assert {str(arm) for arm, _ in plan} == {
        "random real",
        "dsa, weight 0",
        f"dsa, weight {best['mim']['mim_weight']}".removesuffix(".0"),
    }


def test_the_default_settings_are_tried_first_as_far_as_they_are_searched(tmp_path, scored):
    ran = scored(peak)
    arguments = [*QUICK, "--ipc", "10", "--trials", "1", "--seeds", "0", "--mim-pairs", "cluster"]
    default = parse([*QUICK, "--ipc", "10", "--mim-pairs", "cluster"]).mim
    assert tune.main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    assert ran[1].mim == default
    narrow = ["--temperatures", "0.2", "1", "--layers", "last", "--networks", "base"]
    assert tune.main([*arguments, *narrow, "--out", str(tmp_path / "narrow")]) == 0
    tried = ran[3].mim
    assert (tried.mim_weight, tried.mim_layers, tried.mim_networks) == (default.mim_weight, "last", "base")
    assert 0.2 <= tried.mim_temperature <= 1


def test_a_file_that_gives_no_split_leaves_the_one_of_the_search(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text('{"data": {"zca": true}, "distill": {"iterations": 7}}')
    tuning = read(tune.Tuning, "tune", ["--config", str(path)])
    assert (tuning.data.validation, tuning.data.zca, tuning.distill.iterations) == (0.1, True, 7)


def test_all_that_is_searched_is_reported():
    assert set(tune_report.SETTINGS) == set(tune_settings.SEARCHED.values())


def test_poor_trials_are_given_up_early(tmp_path, scored):
    scored(peak)
    out = tmp_path / "out"
    assert tune.main([*QUICK, "--trials", "20", "--out", str(out)]) == 0
    trials = written(out)["found"]["trials"]
    early = [trial for trial in trials if not trial["complete"]]
    assert early
    assert all(len(trial["accuracies"]) < 3 and trial["failed"] is None for trial in early)
    assert all(trial["complete"] for trial in trials[:5])
    best = max(trial["accuracies"]["0"] for trial in trials)
    assert all(trial["accuracies"]["0"] < best for trial in early)


def test_a_poor_trial_that_ran_on_all_seeds_is_complete(tmp_path, scored):
    """The others gain 0.1 and 0.3; the last as much on the first seed, but nothing on the second."""

    def score(config):
        later = 0.3 if len(ran) // 2 < 6 else 0.0
        return 0.5 + (later if config.seed else 0.1) * bool(config.mim.mim_weight)

    ran = scored(score)
    out = tmp_path / "out"
    assert tune.main([*QUICK, "--trials", "6", "--seeds", "0", "1", "--out", str(out)]) == 0
    last = written(out)["found"]["trials"][6]
    assert last["accuracies"] == {"0": 0.6, "1": 0.5}
    assert last["complete"]


def test_the_seed_of_the_search_decides_what_is_tried(tmp_path, scored):
    ran = scored(peak)
    for seed in ("0", "1"):
        arguments = ["--trials", "2", "--seeds", "4", "--seed", seed, "--out", str(tmp_path / seed)]
        assert tune.main([*QUICK, *arguments]) == 0
    assert {config.seed for config in ran} == {4}
    base, default, first, *again, second = (config.mim for config in ran)
    assert again == [base, default], "which nobody draws"
    for setting in ("mim_weight", "mim_temperature"):
        values = [getattr(mim, setting) for mim in (first, second)]
        assert values[0] != values[1]
        assert values == [float(f"{value:.3g}") for value in values], "three digits"


def test_a_search_cut_off_goes_on_as_if_it_had_not_been(tmp_path, scored, capsys):
    ran = scored(peak)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = [*QUICK, "--trials", "12", "--seeds", "0", "1"]
    assert tune.main([*arguments, "--out", str(whole)]) == 0
    runs = len(ran)
    ran.clear()

    def interrupt(config):
        if len(ran) == 15:
            raise KeyboardInterrupt
        return peak(config)

    scored(interrupt)
    assert tune.main([*arguments, "--out", str(cut)]) == 130
    assert "trials are finished; run the same command again to continue" in capsys.readouterr().err
    before = written(cut)["found"]["trials"]
    assert 6 <= len(before) < 13
    scored(peak)
    assert tune.main([*arguments, "--out", str(cut)]) == 0
    assert written(cut)["found"] == written(whole)["found"]
    assert len(ran) == runs, "nothing was run twice"
    assert tune.main([*arguments, "--memory-budget", "2", "--out", str(cut)]) == 0
    assert len(ran) == runs
    assert tune.main([*arguments, "--trials", "13", "--out", str(cut)]) == 0
    assert written(cut)["found"]["trials"][:13] == written(whole)["found"]["trials"]


def test_a_folder_of_something_else_is_left_alone(tmp_path, scored, capsys):
    scored(peak)
    (tmp_path / "tune.md").write_text("my own notes")
    assert tune.main([*QUICK, "--trials", "1", "--out", str(tmp_path)]) == 2
    assert f"--out {tmp_path} holds tune.md, which is of something else" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tune.md"]


def test_other_settings_are_refused(tmp_path, scored, capsys):
    scored(peak)
    arguments = [*QUICK, "--trials", "1", "--out", str(tmp_path / "out")]
    assert tune.main(arguments) == 0
    for other in (["--seeds", "5"], ["--iterations", "3"], ["--weights", "1", "2"], ["--seed", "1"]):
        before = (tmp_path / "out" / "tune.json").read_bytes()
        assert tune.main([*arguments, *other]) == 2
        assert "holds a search with other settings: " in capsys.readouterr().err
        assert (tmp_path / "out" / "tune.json").read_bytes() == before


def test_a_search_on_other_images_is_refused(tmp_path, scored, capsys):
    scored(peak)
    path, log = tmp_path / "data.npz", tmp_path / "out" / "trials.log"
    arguments = [*QUICK, "--dataset", npz(path), "--seeds", "0", "--out", str(tmp_path / "out")]
    assert tune.main([*arguments, "--trials", "1"]) == 0
    npz(path, x_train=np.full((40, 12, 12, 3), 7, np.uint8))
    cells._load.cache_clear()  # as a new process begins
    for trials in ("1", "2"):
        assert tune.main([*arguments, "--trials", trials]) == 2
        assert f"holds a run on other images of {path}; give another --out" in capsys.readouterr().err
    older, count = re.subn(',"data":"[0-9a-f]{16}"', "", log.read_text())
    assert count == 1
    log.write_text(older)
    assert tune.main([*arguments, "--trials", "2"]) == 0, "where nothing is known of the images"


def test_the_test_set_is_never_looked_at(tmp_path, monkeypatch):
    """A real search, small, with a test set that cannot be used."""
    monkeypatch.setattr(cells, "_load", lambda *arguments: (load(*arguments)[0], None))
    out = tmp_path / "out"
    searched = ["--mim-loss", "nce", "--projections", "random", "--noise-ratios", "2"]
    assert tune.main([*QUICK, "--trials", "1", "--seeds", "0", *searched, "--out", str(out)]) == 0
    found = written(out)["found"]
    assert all(0 <= trial["accuracies"]["0"] <= 1 for trial in found["trials"])
    assert (found["trials"][1]["mim"]["mim_projection"], found["trials"][1]["mim"]["mim_noise_ratio"]) == (
        "random",
        2,
    )
    cells_ = sorted((out / "cells").glob("*/seed0/result.json"))
    assert [json.loads(path.read_text())["evaluated_on"] for path in cells_] == ["validation"] * 2


def test_a_trial_that_diverges_is_recorded_and_the_others_go_on(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--trials", "2", "--seeds", "0", "1", "--weights", "2e38", "3e38", "--out", str(out)]
    assert tune.main([*QUICK, "--mim-loss", "nce", *arguments]) == 0
    found = written(out)["found"]
    assert ["became inf" in trial["failed"] for trial in found["trials"][1:]] == [True, True]
    assert found["best"] == 0
    assert written(out)["config"]["mim"]["mim_weight"] == 0
    assert "No trial beat the base method" in capsys.readouterr().out


def test_a_base_that_diverges_ends_the_search(tmp_path, capsys):
    out = tmp_path / "out"
    for _ in range(2):
        assert tune.main([*QUICK, "--iterations", "12", "--image-lr", "3e38", "--out", str(out)]) == 1
        assert "the base method alone failed" in capsys.readouterr().err
    assert not (out / "tune.json").exists()
    assert [path.name for path in (out / "cells").iterdir()] == ["base"], "no trial follows"


def trial(weight, *accuracies, complete=True):
    return Trial(MimConfig(mim_weight=weight, mim_temperature=0.1), dict(enumerate(accuracies)), complete)


def test_what_is_said_of_the_best():
    base = trial(0.0, 0.5, 0.6, 0.7)
    clear, noise, worse = (
        trial(1.0, 0.52, 0.62, 0.721),
        trial(2.0, 0.50, 0.7, 0.69),
        trial(3.0, 0.4, 0.6, 0.7),
    )
    unfinished = trial(4.0, 0.9, complete=False)
    assert ranked([base, worse, unfinished, clear, noise]) == [4, 3, 0, 1]
    assert "Trial 1 is +2.03 [+1.89, +2.18] points over the base." in verdict([base, clear, worse])
    assert "chosen among 2 on these very seeds" in verdict([base, clear, worse])
    assert "The best trial, 2, is within noise of the base: +3.00 [" in verdict([base, clear, noise])
    assert verdict([base, worse, unfinished]) == "No trial beat the base method: leave the term out."
    single = verdict([trial(0.0, 0.5), trial(1.0, 0.6)])
    assert "+10.00 points over the base on one seed, which cannot be told from noise" in single
    lines = table([base, worse, unfinished, clear])
    assert [line[0] for line in lines] == ["0", "3", "1"]
    assert lines[0][-2:] == ("60.00 ± 10.00", "")
    assert lines[1][1:3] == ("1", "0.1")
    many = [base, *(trial(weight, 0.5, 0.6, 0.7 + weight / 100) for weight in range(1, 8))]
    assert [line[0] for line in table(many)] == ["0", "7", "6", "5", "4", "3"], "the base and the best five"
    assert columns([base, worse, clear]) == ("trial", "weight", "τ", "accuracy, %", "difference, points")
    other = dataclasses.replace(worse, mim=dataclasses.replace(worse.mim, mim_layers="last"))
    assert columns([base, other, clear])[3] == "layers"
    assert [line[3] for line in table([base, other, clear])] == ["", "all", "last"]


def test_trials_given_up_and_failed_are_counted_apart():
    early = trial(2.0, 0.4, complete=False)
    failed = dataclasses.replace(trial(3.0, complete=False), failed="it diverged")
    counts = tune_report._counts([trial(0.0, 0.5, 0.6), trial(1.0, 0.6, 0.7), early, early, failed])
    assert counts == "4 trials: 2 given up early, 1 failed."


@pytest.mark.parametrize(
    ("gains", "noise"), [((-0.1, -0.1), True), ((0.1, 0.3), True), ((0.1, 0.1001), False)]
)
def test_what_is_no_better_than_the_base_is_within_noise(tmp_path, scored, gains, noise):
    scored(lambda config: 0.5 + gains[config.seed] * bool(config.mim.mim_weight))
    assert tune.main([*QUICK, "--trials", "1", "--seeds", "0", "1", "--out", str(tmp_path)]) == 0
    assert written(tmp_path)["found"]["within_noise"] == noise


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--validation", "0"], "--validation is 0: settings are never chosen on the test set"),
        (["--num-eval", "0"], "--num-eval is 0: nothing to choose by"),
        (["--trials", "0"], "--trials is 0, expected at least 1"),
        (["--seeds"], "--seeds is empty"),
        (["--seeds", "0", "0"], "--seeds is 0 0, expected each seed once"),
        (["--noise-ratios"], "--noise-ratios is empty"),
        (["--noise-ratios", "-1"], "--mim-noise-ratio is -1.0"),
        (["--weights", "0", "1"], "--weights is 0.0 1.0, expected two positive numbers, the smaller first"),
        (["--temperatures", "2", "1"], "--temperatures is 2.0 1.0"),
        (["--mim-loss", "nce", "--temperatures", "0.01", "1"], "too low for a calibrated noise ratio"),
        (["--layers", "first"], "--mim-layers is 'first'"),
        (["--layers", "last", "0,7"], "there is no layer 7"),
        (["--method", "dn"], "unknown method 'dn'"),
        (["--ipc", "1000"], "fewer than the 1000 asked for"),
    ],
)
def test_bad_input_exits_with_2_and_writes_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert tune.main([*QUICK, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_optuna(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.chdir(tmp_path)
    assert tune.main(QUICK) == 2
    assert (
        "the package optuna is missing; pip install --no-build-isolation -e '.[tune]'"
        in capsys.readouterr().err
    )


def test_a_journal_whose_end_a_full_disk_cut_off_goes_on(tmp_path, scored):
    ran = scored(peak)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = [*QUICK, "--trials", "2", "--seeds", "0"]
    for out in (whole, cut):
        assert tune.main([*arguments, "--out", str(out)]) == 0
    log = cut / "trials.log"
    log.write_text(log.read_text()[:-20])
    assert tune.main([*arguments, "--out", str(cut)]) == 0
    assert len(ran) == 6, "nothing was run again"
    assert written(cut)["found"] == written(whole)["found"]


def test_a_damaged_journal_is_named_and_its_runs_are_not_lost(tmp_path, scored, capsys):
    ran = scored(peak)
    out = tmp_path / "out"
    arguments = [*QUICK, "--trials", "2", "--seeds", "0", "--out", str(out)]
    assert tune.main(arguments) == 0
    before = written(out)["found"]["trials"]
    log = out / "trials.log"
    log.write_text(log.read_text()[:-20] + "\n" + "{")
    assert tune.main([*arguments, "--trials", "3"]) == 2
    assert "trials.log is damaged" in capsys.readouterr().err
    log.unlink()
    runs = len(ran)
    assert tune.main(arguments) == 0
    assert len(ran) == runs, "nothing was run twice"
    assert written(out)["found"]["trials"] == before
