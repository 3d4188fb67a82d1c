"""The output of a comparison: compare.md, compare.json and compare.png, rewritten after every cell."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import files
from .compare_table import COLUMNS, Arm, Outcomes, Row, rows

NOTES = """\
Accuracy on the {split} set: mean ± standard deviation over the seeds, each the mean of {networks}
trained from scratch on the images alone. The arms of a seed start from the same images, draw the same real
images and train the same networks; differences are paired by seed: mean [95 % t-interval], no interval for a
single pair. An interval that excludes 0 means p < 0.05 for that row alone: among many rows some do by chance.
The arms have the same number of iterations, not the same time: the time of distilling is the mean over the
seeds, in seconds of wall time, comparable where nothing else ran meanwhile.
"""
SPLITS = "Each seed holds out a validation split of its own, the same for all its arms.\n"


def write(
    folder: Path, arms: Sequence[Arm], outcomes: Outcomes, total: int, settings: Mapping[str, Any]
) -> None:
    """Write the three files, each whole or not at all.

    Args:
        folder: where.
        arms: all that is compared, in order.
        outcomes: of the cells finished so far.
        total: the number of cells.
        settings: what all cells share, as JSON-able values.
    """
    tables: dict[str | None, list[Row]] = {None: rows(arms, outcomes)}
    tables |= {name: rows(arms, outcomes, name) for name in settings["eval"]["eval_archs"]}
    facts = {
        "cells": len(outcomes),
        "cells_in_all": total,
        "rows": [row.facts() for row in tables[None]],
        "cross_architecture": {
            name: [row.facts() for row in table if row.accuracies] for name, table in tables.items() if name
        },
        "devices": _all("device", outcomes),
        "versions": _all("version", outcomes),
        "settings": settings,
    }
    picture = io.BytesIO()
    draw(tables[None]).savefig(picture, format="png", dpi=150)
    files.write(folder / "compare.md", _markdown(tables, facts, outcomes))
    files.write(folder / "compare.png", picture.getvalue())
    files.write(folder / "compare.json", json.dumps(facts, indent=2))


def markdown_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return "".join(f"| {' | '.join(line)} |\n" for line in (columns, ["---"] * len(columns), *lines))


def _all(fact: str, outcomes: Outcomes) -> list[str]:
    return sorted({outcome[fact] for outcome in outcomes.values() if fact in outcome})


def _markdown(tables: Mapping[str | None, list[Row]], facts: Mapping[str, Any], outcomes: Outcomes) -> str:
    settings = facts["settings"]
    validation = settings["data"]["validation"]
    counts = sorted({o["num_networks"] for o in outcomes.values() if "num_networks" in o})
    networks = " or ".join(map(str, counts)) + (" network" if counts == [1] else " networks")
    parts = [f"# Comparison on {settings['data']['dataset']}\n"]
    if facts["cells"] < facts["cells_in_all"]:
        parts.append(f"So far: {facts['cells']} of {facts['cells_in_all']} cells.\n")
    if not outcomes:
        return "\n".join(parts)
    for architecture, table in tables.items():
        if architecture:
            parts.append(f"## Trained: {architecture}\n")
            table = [row for row in table if row.accuracies]
        parts.append(markdown_table(COLUMNS, [row.cells() for row in table]))
    parts.append(
        NOTES.format(split="validation" if validation else "test", networks=networks)
        + (SPLITS if validation else "")
    )
    failed = [
        f"- {row.arm}, IPC {row.arm.ipc}, seed {seed}: {why}\n"
        for row in tables[None]
        for seed, why in row.failed.items()
    ]
    if failed:
        parts.append("Failed, and not run again until the folder is removed:\n\n" + "".join(failed))
    parts.append(f"mim4dd {', '.join(facts['versions'])} on {', '.join(facts['devices'])}.\n")
    parts.append(
        f"Settings of all cells:\n\n```json\n{json.dumps(settings, indent=2, ensure_ascii=False)}\n```\n"
    )
    return "\n".join(parts)


def draw(table: Sequence[Row]) -> Figure:
    """Draw accuracies and paired differences, a line for each arm, in a block for each IPC."""
    lines: list[tuple[float, Row]] = []
    headings: list[tuple[float, int]] = []
    y = 0.0
    for ipc, block in itertools.groupby(table, key=lambda row: row.arm.ipc):
        headings.append((y, ipc))
        for row in block:
            y += 1
            lines.append((y, row))
        y += 1.4
    figure = Figure(figsize=(10, 1.3 + 0.32 * y), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    names = list(dict.fromkeys(row.arm.name for row in table if row.arm.weight is not None))
    for height, row in lines:
        colour = "grey" if row.arm.weight is None else f"C{names.index(row.arm.name)}"
        _draw_line(left, right, height, row, colour)
    for height, ipc in headings:
        left.text(
            0.01, height, f"{ipc} per class", weight="bold", va="center", transform=left.get_yaxis_transform()
        )
    left.set_yticks([height for height, _ in lines], [str(row.arm) for _, row in lines])
    left.set(xlabel="%, of each seed, and mean ± standard deviation", title="Accuracy", ylim=(y - 0.6, -0.7))
    right.set(xlabel="points, mean and 95 % interval\n(filled: without 0)", title="Difference to weight 0")
    right.axvline(0, color="black", linewidth=0.8)
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def _draw_line(left: Axes, right: Axes, y: float, row: Row, colour: str) -> None:
    if row.score:
        seeds = [100 * accuracy for accuracy in row.accuracies.values()]
        left.plot(seeds, [y] * len(seeds), "o", color=colour, alpha=0.3, markersize=4)
        mean, std = row.score.mean, row.score.std or 0
        left.errorbar(100 * mean, y, xerr=100 * std, fmt="D", color=colour, capsize=3, markersize=5)
    if row.difference:
        margin = row.difference.margin
        right.errorbar(
            100 * row.difference.mean,
            y,
            xerr=None if margin is None else 100 * margin,
            fmt="D",
            color=colour,
            markerfacecolor=colour if row.difference.clear else "white",
            capsize=3,
            markersize=5,
        )
