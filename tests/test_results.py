"""The tables of accuracies in README.md and docs/results.md hold what the stored results of the runs hold."""

import json
import re
from pathlib import Path

import pytest

from mim4dd.commands.presets import at_ipc
from mim4dd.objectives import METHODS
from mim4dd.studies.paired import paired_difference

ROOT = Path(__file__).parent.parent
FOLDERS = {"Fashion-MNIST": "fashion-mnist", "CIFAR-10 (JPEG)": "cifar10-jpeg"}


def tables(page):
    """Yield the rows of every table of accuracies, by heading, with the data and number from above them."""
    for table in re.findall(r"^\| data \|.*\n(?:\|.*\n)+", (ROOT / page).read_text(), re.M):
        head, _, *lines = table.splitlines()
        above = {}
        for line in lines:
            row = dict(zip(cells(head), cells(line), strict=True))
            above = {name: row[name] or above[name] for name in ("data", "images per class")}
            yield row | above


def cells(line):
    return [cell.strip() for cell in line.strip("|\n").split("|")]


def stored(folder, name, weight, ipc, updates=None):
    """Return the row of a method at a weight, or of a baseline (weight None), of the stored comparisons."""
    reports = [json.loads(p.read_text()) for p in (ROOT / "bench/results").glob(f"{folder}/compare.json")]
    rows = [
        row
        for report in reports
        for row in report["rows"]
        if report["settings"]["distill"]["iterations"] == updates
        and (row["name"], row["mim_weight"], row["ipc"]) == (name, weight, ipc)
    ]
    assert len(rows) == 1, (folder, name, weight, ipc, updates)
    return rows[0]


def percent(row, *, std=True):
    spread = f" ± {100 * row['accuracy_std']:.1f}" if std else ""
    return f"{100 * row['accuracy_mean']:.1f}{spread} %"


def difference(ours, base):
    """As the pages have it: bold if the 95 % interval is above 0."""
    paired = paired_difference(ours["accuracies"], base["accuracies"])
    mean, interval = str(paired).replace("[+", "[").replace(", +", ", ").split(" ", 1)
    return f"**{mean}** {interval}" if paired.clear and paired.mean > 0 else f"{mean} {interval}"


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_accuracies_are_those_of_the_stored_runs(page):
    seen, pairs, ahead = set(), 0, 0
    for row in tables(page):
        if row["data"].startswith("digits"):
            continue  # one seed, no comparison
        method, unaugmented = re.match(r"`(\w+)( --augmentation none)?`", row["method"]).groups()
        folder, ipc = FOLDERS[row["data"]], int(row["images per class"])
        main = f"{folder}-unaugmented" if unaugmented else folder
        term = stored(main, method, at_ipc(METHODS[method].mim_weights["info-nce"], ipc), ipc)
        if updates := row.get("updates without the term"):
            base = stored(f"{folder}-equal-time/*", method, 0, ipc, int(updates.replace(",", "")))
        else:
            base = stored(main, method, 0, ipc)
            pairs += len(base["accuracies"])
            ahead += sum(term["accuracies"][seed] > one for seed, one in base["accuracies"].items())
        for name in ("random", "kmeans"):
            if given := row.get({"random": "random real", "kmeans": "k-means start"}[name], "").strip("–"):
                assert given == percent(stored(folder, name, None, ipc))
        assert row["without the term"] == percent(base)
        assert row["with it"] == percent(term)
        assert row["difference"] == difference(term, base)
        seen.add((row["data"], ipc))
    assert len(seen) >= 5
    assert f"The term is ahead in {ahead} of the {pairs} pairs" in " ".join((ROOT / page).read_text().split())


def test_the_published_protocol_is_that_of_the_stored_accuracies():
    pattern = re.compile(r"^## The published protocol\n.*?(?=^## )", re.M | re.S)
    (section,) = pattern.findall((ROOT / "docs/results.md").read_text())
    runs = json.loads((ROOT / "bench/results/published-protocol/accuracies.json").read_text())
    for run in runs:
        assert run["num_networks"] == len(run["accuracies"])
        # Beside the number of updates where they are fewer than published.
        updates = "" if run["iterations"] == 20_000 else rf"(,| \|) {run['iterations']:,}\b"
        assert re.search(rf"\| {percent(run)}{updates}", section), run
        if "random_images" in run:
            assert percent(run["random_images"]) in section
