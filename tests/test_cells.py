"""Cells: whose settings are whose, and what is left in their folders."""

import json
from pathlib import Path

import pytest
from commands import parse

from mim4dd.commands.config_json import to_json
from mim4dd.data import load
from mim4dd.errors import InputError
from mim4dd.seeding import generator
from mim4dd.studies.cells import BaselineCell, Cell, refuse_others
from mim4dd.synthetic import initialise


def settings(options=""):
    return parse(["--quick", "--precision", "fp32", *options.split()])


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ("--seed 1", "seed 1 (now 0)"),
        ("--ipc 3", "ipc 3 (now 1)"),
        ("--validation 0.2", "validation 0.2 (now 0.0)"),
        ("--mim-layers last", "mim_layers last (now all)"),
    ],
)
def test_a_run_of_other_settings_is_refused(options, difference):
    with pytest.raises(InputError) as error:
        refuse_others(Path("there"), to_json(settings(options)), settings())
    assert f"there holds a run with other settings: {difference}; give" in str(error.value)


def test_where_and_how_it_was_asked_for_is_no_other_setting():
    sizes = "--iterations 5 --real-batch 4 --width 8 --num-eval 1 --eval-epochs 2 --init real"
    sizes += " --num-experts 1 --expert-snapshots 6 --expert-batches 6 --max-start 3 --student-steps 5"
    elsewhere = ["--out", "there", "--overwrite", "--memory-budget", "2"]
    there = parse(["--precision", "fp32", *elsewhere, *sizes.split()])
    refuse_others(Path("there"), to_json(there), settings(sizes))


def test_a_setting_that_came_later_than_a_file_had_its_default_there():
    """There were no clusters, and no whitening, when it was written."""
    old = to_json(settings())
    del old["mim"]["mim_pairs"], old["data"]["zca"]
    refuse_others(Path("there"), old, settings())
    with pytest.raises(
        InputError, match=r"settings: zca False \(now True\), mim_pairs class \(now cluster\);"
    ):
        refuse_others(Path("there"), old, settings("--mim-pairs cluster --zca"))


def test_a_baseline_is_the_same_for_all_runs_whose_real_images_are():
    def baseline(options=""):
        return BaselineCell.of(Path("there"), "random", settings(f"--ipc 2 {options}"))

    first = baseline()
    runs = [
        "--eval-archs mlp,lenet",
        "--init real",
        "--method ncfm --image-lr 3",
        "--mim-weight 5 --soft-labels",
    ]
    for options in runs:
        assert baseline(options) == first
    assert first.config.distill.init == "noise", "which costs nothing"
    assert first.config.mim.mim_weight == 0
    others = ["--seed 1", "--validation 0.2", "--augmentation crop", "--width 8", "--network mlp"]
    for options in [*others, "--ipc 3", "--eval-epochs 7", "--num-eval 2"]:
        assert baseline(options) != first


def test_a_set_that_is_not_of_a_run_is_refused(tmp_path):
    initialise(load("digits")[0], 1, "real", generator(0, "init")).save(tmp_path / "synthetic.safetensors")
    with pytest.raises(InputError, match="is not from a mim4dd run; remove its folder"):
        Cell(tmp_path, settings()).found()


@pytest.mark.parametrize("before", [None, '{"failed": "before"}'])
def test_an_outcome_is_written_whole_or_not_at_all(tmp_path, monkeypatch, before):
    path = tmp_path / "failed.json"
    if before:
        path.write_text(before)

    whole = Path.write_bytes

    def half(self, content):
        whole(self, content[:9])
        raise OSError("disk full")

    cell = Cell(tmp_path, settings())
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match="disk full"):
            cell._write("failed.json", {"failed": "now"})
    assert [file.read_text() for file in tmp_path.iterdir()] == ([before] if before else [])
    cell._write("failed.json", {"failed": "now"})
    assert json.loads(path.read_text())["failed"] == "now"
    assert cell.found()["failed"] == "now"
