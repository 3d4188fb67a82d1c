"""Comparison: what is run, what is found again, and the numbers that come of it."""

import json
import shutil

import numpy as np
import pytest
import torch
from commands import npz
from PIL import Image

from mim4dd import compare
from mim4dd.commands.options import read
from mim4dd.distill import DivergenceError
from mim4dd.errors import InputError
from mim4dd.experiment import Experiment
from mim4dd.studies import cells
from mim4dd.studies.compare_table import Arm
from mim4dd.synthetic import SyntheticSet

QUICK = ["--quick", "--iterations", "0", "--eval-epochs", "20"]
GRID = ["--methods", "dm", "dsa", "--mim-weights", "0", "5", "--ipcs", "1", "--seeds", "0", "1"]
NAMES = [
    f"{arm}-ipc1-seed{seed}" for arm in ("random", "dm-w0", "dm-w5", "dsa-w0", "dsa-w5") for seed in (0, 1)
]


def comparison(*arguments) -> compare.Comparison:
    return read(compare.Comparison, "compare", ["--quick", *arguments])


@pytest.fixture(scope="module")
def without_updates(tmp_path_factory):
    """A finished comparison whose images are not updated at all."""
    out = tmp_path_factory.mktemp("compare") / "out"
    assert compare.main([*QUICK, *GRID, "--out", str(out)]) == 0
    return out


@pytest.fixture
def finished(without_updates, tmp_path):
    """A copy of it to spoil."""
    return shutil.copytree(without_updates, tmp_path / "out")


def result(out, name):
    return json.loads((out / "cells" / name / "result.json").read_text())


def facts(out):
    return json.loads((out / "compare.json").read_text())


def bytes_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_arms_of_a_seed_share_start_and_networks(without_updates):
    """Images that are not updated score the same in every arm: same start, same networks, same test set."""
    for seed in (0, 1):
        sets = [
            SyntheticSet.load(without_updates / "cells" / f"{arm}-ipc1-seed{seed}" / "synthetic.safetensors")
            for arm in ("dm-w0", "dm-w5", "dsa-w0", "dsa-w5")
        ]
        assert all(torch.equal(s.images, sets[0].images) for s in sets)
    accuracies = {name: result(without_updates, name)["accuracies"] for name in NAMES}
    assert accuracies["dm-w0-ipc1-seed0"] == accuracies["dm-w5-ipc1-seed0"] == accuracies["dsa-w5-ipc1-seed0"]
    assert accuracies["dm-w0-ipc1-seed0"] != accuracies["dm-w0-ipc1-seed1"]
    for row in facts(without_updates)["rows"]:
        if row["mim_weight"]:
            assert row["difference"] == {"mean": 0.0, "interval": [0.0, 0.0], "confidence": 0.95, "pairs": 2}


def test_arms_of_a_seed_share_the_real_images():
    plan = compare.cells(comparison("--validation", "0.2", *GRID))
    experiments = {
        seed: [Experiment.prepare(c.config) for (_, s), c in plan.items() if s == seed] for seed in (0, 1)
    }
    for first, *others in experiments.values():
        assert len(others) == 4
        for other in others:
            assert torch.equal(first.train.images, other.train.images)
            assert torch.equal(first.test.images, other.test.images)
    assert not torch.equal(experiments[0][0].test.images, experiments[1][0].test.images)


def test_every_cell_is_a_run_and_baselines_run_once(without_updates):
    assert sorted(path.name for path in (without_updates / "cells").iterdir()) == sorted(NAMES)
    run = without_updates / "cells" / "dsa-w5-ipc1-seed1"
    assert sorted(p.name for p in run.iterdir()) == [
        "images.png",
        "report.html",
        "result.json",
        "synthetic.safetensors",
    ]
    assert result(without_updates, "dsa-w5-ipc1-seed1")["baselines"] == {}
    random = result(without_updates, "random-ipc1-seed1")
    assert 0 < random["accuracy_mean"] < 1
    assert random["evaluated_on"] == "test"
    written = facts(without_updates)
    assert (written["cells"], written["cells_in_all"]) == (10, 10)
    assert [(row["name"], row["mim_weight"]) for row in written["rows"]] == [
        ("random", None), ("dm", 0.0), ("dm", 5.0), ("dsa", 0.0), ("dsa", 5.0),
    ]  # fmt: skip


def test_finished_cells_are_not_run_again(finished, monkeypatch, capsys):
    monkeypatch.setattr(cells.Cell, "run", lambda self: pytest.fail(f"{self.folder} was run again"))
    before = facts(finished)
    assert compare.main([*QUICK, *GRID, "--out", str(finished)]) == 0
    assert "10 of 10 cells are in" in capsys.readouterr().out
    assert facts(finished) == before


def test_a_comparison_goes_on_with_another_memory_budget(finished, monkeypatch):
    monkeypatch.setattr(cells.Cell, "run", lambda self: pytest.fail(f"{self.folder} was run again"))
    assert compare.main([*QUICK, *GRID, "--out", str(finished), "--memory-budget", "2"]) == 0


def test_two_comparisons_at_once_share_a_table_and_their_cells(tmp_path, scored, capsys):
    """The other one begins and ends in the middle of the first cell of ours."""
    out = tmp_path / "out"
    command = [*QUICK, "--methods", "dm", "--mim-weights", "0", "5", "--baselines", "--out", str(out)]

    def score(config):
        if config.seed == 0 and not ran:
            assert compare.main([*command, "--seeds", "1", "2"]) == 0
        return 0.5

    ran = scored(score)
    assert compare.main([*command, "--seeds", "0", "1"]) == 0
    assert len(ran) == 6, "nothing was run twice"
    assert facts(out)["cells"] == 6
    assert [len(row["accuracies"]) for row in facts(out)["rows"]] == [3, 3]
    assert "50.00 ± 0.00 │ 3 " in capsys.readouterr().out.split("Wrote compare.md")[1]


def test_more_of_anything_adds_to_what_is_there(finished, scored):
    ran = scored(lambda config: 0.5)
    more = ["--methods", "dsa", "dm", "--mim-weights", "5", "0", "7", "--ipcs", "1", "--seeds", "1", "0"]
    assert compare.main([*QUICK, *more, "--baselines", "random", "kmeans", "--out", str(finished)]) == 0
    assert {(c.distill.method, c.mim.mim_weight, c.seed) for c in ran} == {
        (method, 7.0, seed) for method in ("dm", "dsa") for seed in (0, 1)
    }
    assert len(ran) == 4
    assert result(finished, "kmeans-ipc1-seed0")["accuracy_mean"] > 0


def test_the_table_holds_all_that_is_in_the_folder(finished, scored):
    scored(lambda config: 0.5)
    other = ["--methods", "ncfm", "--mim-weights", "0", "--ipcs", "2", "--seeds", "0", "--baselines"]
    assert compare.main([*QUICK, *other, "--out", str(finished)]) == 0
    written = facts(finished)
    assert (written["cells"], written["cells_in_all"]) == (11, 11)
    table = [(row["name"], row["mim_weight"], row["ipc"], len(row["accuracies"])) for row in written["rows"]]
    assert table == [
        ("random", None, 1, 2), ("dm", 0.0, 1, 2), ("dm", 5.0, 1, 2), ("dsa", 0.0, 1, 2), ("dsa", 5.0, 1, 2),
        ("ncfm", 0.0, 2, 1),
    ]  # fmt: skip


def test_the_table_says_what_the_term_costs(finished, scored):
    """The run of a stand-in takes 3 seconds to distil."""
    scored(lambda config: 0.5)
    other = ["--methods", "ncfm", "--mim-weights", "0", "--seeds", "0", "1", "--baselines"]
    assert compare.main([*QUICK, *other, "--out", str(finished)]) == 0
    seconds = {row["name"]: row["seconds"] for row in facts(finished)["rows"]}
    assert seconds["ncfm"] == 3.0
    assert seconds["random"] is None
    assert "| 1 | ncfm | 0 | 50.00 ± 0.00 | 2 | 3 |  |" in (finished / "compare.md").read_text()


def test_other_settings_are_refused(finished, capsys):
    before = bytes_of(finished)
    command = [*QUICK, *GRID, "--out", str(finished), "--iterations", "1"]
    assert compare.main([*QUICK, "--seeds", "7", "--iterations", "1", "--out", str(finished)]) == 2
    error = capsys.readouterr().err
    assert f"{finished} holds a comparison with other settings: iterations 0 (now 1); give another" in error
    assert compare.main(command) == 2
    (finished / "compare.json").unlink()
    capsys.readouterr()
    assert compare.main(command) == 2
    assert "iterations 0 (now 1); give another --out, or remove that folder" in capsys.readouterr().err
    assert bytes_of(finished) == {p: b for p, b in before.items() if p.name != "compare.json"}


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "compare.md").write_text("my own notes")
    assert compare.main([*QUICK, *GRID, "--out", str(tmp_path)]) == 2
    assert f"--out {tmp_path} holds compare.md, which is of something else" in capsys.readouterr().err
    assert [*bytes_of(tmp_path).values()] == [b"my own notes"]


def test_cells_of_another_precision_are_refused(finished, capsys):
    """As where another processor takes another one by default."""
    for cell in (finished / "cells").glob("*/result.json"):
        outcome = json.loads(cell.read_text())
        outcome["config"]["precision"] = "tf32"
        cell.write_text(json.dumps(outcome))
    assert compare.main([*QUICK, "--seeds", "7", "--out", str(finished)]) == 2
    error = capsys.readouterr().err
    assert "was computed in tf32, but this machine uses" in error
    assert "by default; give --precision tf32, or another --out" in error


def test_a_table_holds_what_another_process_finished_while_it_was_written(tmp_path, scored, monkeypatch):
    out, write, others = tmp_path / "out", compare.compare_report.write, []
    command = [*QUICK, "--methods", "dm", "--mim-weights", "0", "--baselines", "--out", str(out)]
    scored(lambda config: 0.5)

    def slowly(folder, arms, outcomes, *rest):
        if outcomes and not others:
            others.append(1)
            assert compare.main([*command, "--seeds", "1"]) == 0
        write(folder, arms, outcomes, *rest)

    monkeypatch.setattr(compare.compare_report, "write", slowly)
    assert compare.main([*command, "--seeds", "0"]) == 0
    assert others
    assert facts(out)["cells"] == facts(out)["cells_in_all"] == 2


def test_a_comparison_older_than_a_setting_goes_on(finished):
    path = finished / "compare.json"
    older = json.loads(path.read_text())
    del older["settings"]["mim"]["mim_pairs"]
    path.write_text(json.dumps(older))
    assert compare.main([*QUICK, *GRID, "--out", str(finished)]) == 0


def test_cells_that_were_removed_are_run_again(finished, scored):
    ran = scored(lambda config: 0.5)
    shutil.rmtree(finished / "cells")
    assert (
        compare.main([*QUICK, "--methods", "dm", "--seeds", "0", "--baselines", "--out", str(finished)]) == 0
    )
    assert len(ran) == 2
    assert facts(finished)["cells"] == 2


def test_results_of_other_images_are_refused(tmp_path, capsys):
    path, out = tmp_path / "data.npz", str(tmp_path / "out")
    command = [*QUICK, "--dataset", npz(path), "--mim-weights", "0", "--out", out, "--seeds", "0"]
    assert compare.main(command) == 0
    npz(path, x_train=np.full((40, 12, 12, 3), 7, np.uint8))
    cells._load.cache_clear()  # as a new process begins
    for seeds in (["0"], ["0", "1"], ["1"]):
        assert compare.main([*command[:-1], *seeds]) == 2
        assert f"holds a run on other images of {path}; give another --out" in capsys.readouterr().err
    npz(path)
    cells._load.cache_clear()
    assert compare.main([*command, "1"]) == 0


def test_an_unreadable_result_is_refused(finished, capsys):
    (finished / "cells" / NAMES[2] / "result.json").write_text("{")
    assert compare.main([*QUICK, *GRID, "--out", str(finished)]) == 2
    assert f"{NAMES[2]}/result.json is not a result" in capsys.readouterr().err


def test_an_interrupted_cell_is_run_again(finished, monkeypatch, capsys):
    """Its set in the making is there, as a real interruption leaves it, but no result."""
    for name in ("dm-w5-ipc1-seed1", "dsa-w5-ipc1-seed1"):
        shutil.rmtree(finished / "cells" / name)
    command = [*QUICK, *GRID, "--out", str(finished)]

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mim4dd.experiment.distill", interrupt)
        assert compare.main(command) == 130
    assert "8 of 10 cells are finished; run the same command again to continue" in capsys.readouterr().err
    cut = finished / "cells" / "dm-w5-ipc1-seed1"
    assert [path.name for path in cut.iterdir()] == ["synthetic.safetensors"]
    assert "So far: 8 of 10 cells" in (finished / "compare.md").read_text()
    (finished / "compare.json").unlink()
    other = [*QUICK, "--methods", "dm", "--mim-weights", "5", "--seeds", "1", "--image-momentum", "0.4"]
    assert compare.main([*other, "--baselines", "--out", str(finished)]) == 2
    assert "image_momentum 0.5 (now 0.4)" in capsys.readouterr().err, (
        "nor is the set in the making overwritten"
    )
    assert compare.main(command) == 0
    assert (
        result(finished, "dm-w5-ipc1-seed1")["accuracies"]
        == result(finished, "dm-w0-ipc1-seed1")["accuracies"]
    )


def test_a_cell_that_diverges_is_recorded_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    command = ["--quick", "--iterations", "2", "--eval-epochs", "1", "--seeds", "0", "--out", str(out)]
    command += ["--mim-loss", "nce", "--mim-weights", "3e38", "0", "--baselines", "random"]
    assert compare.main(command) == 1
    assert "1 of 3 cells failed" in capsys.readouterr().err
    diverged = out / "cells" / "dm-w3e+38-ipc1-seed0"
    assert sorted(path.name for path in diverged.iterdir()) == ["failed.json", "synthetic.safetensors"]
    assert "the mim term became inf" in (out / "compare.md").read_text()
    failed = next(row for row in facts(out)["rows"] if row["mim_weight"] == 3e38)
    assert (failed["accuracy_mean"], failed["difference"]) == (None, None)
    assert result(out, "dm-w0-ipc1-seed0")["accuracy_mean"] > 0
    monkeypatch.setattr(cells.Cell, "run", lambda self: pytest.fail(f"{self.folder} was run again"))
    assert compare.main(command) == 1


def test_a_failure_counts_where_it_is_asked_for(tmp_path, scored):
    def score(config):
        if config.mim.mim_weight == 5:
            raise DivergenceError("the mim term became inf")
        return 0.5

    scored(score)
    command = [*QUICK, "--seeds", "0", "--baselines", "--out", str(tmp_path / "out"), "--mim-weights", "0"]
    assert compare.main([*command, "5"]) == 1
    assert compare.main(command) == 0, "the one that failed is not among these"


ACCURACIES = {(0.0, 0): 0.5, (0.0, 1): 0.6, (0.0, 2): 0.7, (10.0, 0): 0.6, (10.0, 1): 0.65, (10.0, 2): 0.9}


def test_table_against_hand_computation(tmp_path, scored):
    """Differences 10, 5, 20: mean 35/3, deviation sqrt(175/3); t(0.975, 2) = 4.302653 in printed tables."""
    scored(lambda config: ACCURACIES[config.mim.mim_weight, config.seed])
    out = tmp_path / "out"
    arguments = ["--quick", "--mim-weights", "0", "10", "--eval-archs", "mlp", "--baselines"]
    assert compare.main([*arguments, "--out", str(out)]) == 0
    base, ours = facts(out)["rows"]
    assert base["accuracy_mean"] == pytest.approx(0.6)
    assert base["accuracy_std"] == pytest.approx(0.1)
    assert base["difference"] is None
    assert ours["accuracy_mean"] == pytest.approx(2.15 / 3)
    margin = 4.302653 * (175 / 3) ** 0.5 / 3**0.5 / 100
    mean = 0.35 / 3
    assert ours["difference"]["mean"] == pytest.approx(mean)
    assert ours["difference"]["interval"] == pytest.approx([mean - margin, mean + margin], rel=1e-6)
    text = (out / "compare.md").read_text()
    assert "| 1 | dm | 0 | 60.00 ± 10.00 | 3 | 3 |  |" in text
    assert "| 1 | dm | 10 | 71.67 ± 16.07 | 3 | 3 | +11.67 [-7.31, +30.64] |" in text
    halved = text.split("## Trained: mlp")[1]
    assert "| 1 | dm | 10 | 35.83 ± 8.04 | 3 | 3 | +5.83 [-3.65, +15.32] |" in halved
    assert Image.open(out / "compare.png").size[0] > 1000


def test_default_weights_are_those_of_run(monkeypatch):
    plan = compare.cells(
        comparison("--methods", "dm", "mtt", "--ipcs", "10", "1", "--seeds", "3", "--baselines")
    )
    assert [str(arm) + f" {arm.ipc}" for arm, _ in plan] == [
        "dm, weight 0 10", "dm, weight 100 10", "mtt, weight 0 10",
        "dm, weight 0 1", "dm, weight 300 1", "mtt, weight 0 1", "mtt, weight 0.1 1",
    ]  # fmt: skip
    cell = plan[Arm("mtt", 0.0, 10), 3]
    assert (cell.config.distill.ipc, cell.config.seed, cell.config.distill.image_lr) == (10, 3, 100)


def test_baselines_are_the_same_whatever_the_methods():
    plans = [compare.cells(comparison("--methods", *m)) for m in (["dc"], ["dc", "dm"], ["dm", "dc"])]
    first, *others = (plan[Arm("random", None, 1), 0].config for plan in plans)
    assert others == [first, first]
    assert first.distill.augmentation == plans[1][Arm("dm", 0.0, 1), 0].config.distill.augmentation != "none"
    bare = compare.cells(comparison("--methods", "dm", "--augmentation", "none"))
    assert bare[Arm("random", None, 1), 0].config.distill.augmentation == "none"


def test_mistakes_are_found_before_any_baseline_is_scored(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cells.BaselineCell, "run", lambda self: pytest.fail("work has begun"))
    arguments = ["--methods", "dm", "--mim-weights", "0", "--factor", "3", "--out", str(tmp_path / "out")]
    assert compare.main([*QUICK, *arguments]) == 2
    assert "--factor 3 does not divide images of 8x8" in capsys.readouterr().err


def test_settings_of_a_file_are_shared(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(
        '{"distill": {"method": "dsa", "iterations": 7}, "mim": {"mim_weight": 3, "mim_layers": "last"}}'
    )
    given = comparison("--config", str(path), "--width", "8")
    assert (given.distill.iterations, given.distill.width, given.mim.mim_layers) == (7, 8, "last")
    assert {arm.name for arm, _ in compare.cells(given)} == {"random", "dm"}
    path.write_text('{"eval": {"baselines": ["base"]}}')
    with pytest.raises(InputError, match=r"baselines is \[\"base\"\], expected .*'random', 'kmeans'"):
        comparison("--config", str(path))


def test_time_left_goes_by_the_cells_like_it():
    plan = compare.cells(comparison("--ipcs", "1", "10", "--mim-weights", "0", "5", "--baselines"))
    assert compare.time_left(plan, {}) == ""
    done = {
        (Arm("dm", 0.0, 1), 0): {"seconds": {"distill": 10.0, "evaluate": 2.0}},
        (Arm("dm", 5.0, 1), 0): {"seconds": {"distill": 6.0, "evaluate": 2.0}},
        (Arm("dm", 0.0, 10), 0): {"seconds": {"distill": 60.0, "evaluate": 10.0}},
    }
    # 4 more of IPC 1 at 10 s, 5 more of IPC 10 at 70 s
    assert compare.time_left(plan, done) == "; about 6 min left"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "dm", "dn"], "unknown method 'dn', did you mean dm"),
        (["--methods"], "--methods is empty"),
        (["--seeds"], "--seeds is empty"),
        (["--ipcs", "1", "1000"], "fewer than the 1000 asked for"),
        (["--ipcs", "0"], "--ipc is 0, expected a number of at least 1"),
        (["--mim-weights", "0", "-1"], "--mim-weight is -1.0, expected a number of at least 0"),
        (["--mim-layers", "7"], "there is no layer 7"),
        (["--num-eval", "0"], "--num-eval is 0: nothing to compare"),
        (["--eval-archs", "mlp,vgg"], "unknown architecture in --eval-archs: 'vgg'"),
        (["--device", "toaster"], "--device toaster is not available here"),
    ],
)
def test_bad_input_exits_with_2_and_writes_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert compare.main([*QUICK, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["--method", "dm"], ["--seed", "1"], ["--baselines", "base"], ["--overwrite"]]
)
def test_options_of_run_that_have_no_meaning_here(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        compare.main([*QUICK, *arguments])
    assert exit_.value.code == 2


def test_baselines_compute_in_the_precision_of_the_comparison():
    plan = compare.cells(comparison("--methods", "dm", "--precision", "bf16"))
    assert {cell.config.precision for cell in plan.values()} == {"bf16"}
    assert any(arm.weight is None for arm, _ in plan)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--span", "100"], "--span 100 needs"), (["--network", "convnet-bn"], "mtt follows weights only")],
)
def test_a_mistake_of_any_method_is_found_before_any_work(tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    assert compare.main([*QUICK, "--methods", "mtt", "dm", *arguments, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
