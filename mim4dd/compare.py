"""`python -m mim4dd.compare`: methods x weights of the term x images per class x seeds, paired by seed."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import extras  # noqa: F401 - before all that needs them
from .commands.config_check import check
from .commands.console import about, complain, console, print_table
from .commands.exits import guarded
from .commands.options import plain, read
from .commands.presets import with_presets
from .config import Config, settled
from .devices import pick_device
from .errors import InputError
from .experiment import resolved
from .files import make_folder
from .objectives import METHODS
from .studies import compare_report
from .studies.cells import (
    BaselineCell,
    Cell,
    differences,
    finished,
    outcome_in,
    refuse_foreign,
    refuse_other_images,
    rehearse,
)
from .studies.compare_settings import Comparison
from .studies.compare_table import COLUMNS, Arm, in_order, rows

Key = tuple[Arm, int]  # an arm and a seed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 1 (a cell diverged), 2 (bad input) or 130."""
    return guarded(lambda: compare(read(Comparison, "python -m mim4dd.compare", arguments)))


def compare(comparison: Comparison) -> int:
    """Run what has not been run, keeping the table up to date; return the exit code.

    Raises:
        InputError: invalid settings, or a folder with others.
    """
    plan, folder, shared = cells(comparison), comparison.folder, comparison.shared()
    found = {key: outcome for key, cell in plan.items() if (outcome := cell.found())}
    outcomes = _earlier(folder, shared, comparison) | found
    for method in comparison.methods:
        runs = (cell.config for (arm, _), cell in plan.items() if arm.name == method)
        rehearse(max(runs, key=lambda c: (c.distill.ipc, c.mim.mim_weight)))
    refuse_foreign(folder, ("compare.json", "cells"))
    make_folder(folder, comparison.data.dataset)

    def report() -> list[Arm]:
        while True:
            seen = finished(folder / "cells")
            outcomes.update(_earlier(folder, shared, comparison))  # from other processes
            every = plan.keys() | outcomes.keys()
            arms = in_order(arm for arm, _ in every)
            compare_report.write(folder, arms, outcomes, len(every), shared)
            if finished(folder / "cells") == seen:
                return arms
            # Another process finished a cell meanwhile; this table may have replaced the one with it.

    arms = report()
    if found:
        console.print(f"{len(found)} of {len(plan)} cells are in {folder}/ already", soft_wrap=True)
    to_run = [key for key in plan if key not in found]
    for k, (arm, seed) in enumerate(to_run, len(found)):
        title = f"Cell {k + 1} of {len(plan)}: {arm}, {arm.ipc} per class, seed {seed}"
        console.print(f"{title}{time_left(plan, outcomes)}", style="bold", soft_wrap=True)
        try:
            cell = plan[arm, seed]
            outcomes[arm, seed] = cell.found() or cell.run()
        except KeyboardInterrupt:
            complain(f"{k} of {len(plan)} cells are finished; run the same command again to continue")
            raise
        arms = report()
    table = rows(arms, outcomes)
    print_table(
        "Mean ± standard deviation over seeds; difference to weight 0, paired by seed, with 95 % interval",
        COLUMNS,
        (row.cells() for row in table),
    )
    console.print(f"Wrote compare.md, compare.json and compare.png into {folder}/", soft_wrap=True)
    failed = sum("failed" in outcomes[key] for key in plan)
    if failed:
        complain(f"{failed} of {len(plan)} cells failed, see {folder / 'compare.md'}")
    return 1 if failed else 0


def cells(comparison: Comparison) -> dict[Key, Cell]:
    """Return every cell by arm and seed, all of a seed before the next, so that a partial table is paired.

    Raises:
        InputError: invalid settings.
    """
    for option, values in {
        "--methods": comparison.methods,
        "--mim-weights": comparison.mim_weights,
        "--ipcs": comparison.ipcs,
        "--seeds": comparison.seeds,
    }.items():
        if not values:
            raise InputError(f"{option} is empty, expected one or more")
    if comparison.eval.num_eval == 0:
        raise InputError("--num-eval is 0: nothing to compare, expected at least 1")
    shared = dataclasses.replace(
        plain(comparison), out=None, overwrite=False, device=str(pick_device(comparison.device))
    )
    folder = comparison.folder / "cells"
    plan: dict[Key, Cell] = {}
    for seed in comparison.seeds:
        for ipc in comparison.ipcs:
            runs = [
                _settings(shared, method, weight, ipc, seed)
                for method in comparison.methods
                for weight in comparison.mim_weights
            ]
            of_ipc = dataclasses.replace(shared.distill, ipc=ipc)
            like = dataclasses.replace(shared, distill=of_ipc, seed=seed)
            for baseline in comparison.eval.baselines:
                arm = Arm(baseline, None, ipc)
                plan[arm, seed] = BaselineCell.of(folder / f"{arm.folder}-seed{seed}", baseline, like)
            for config in runs:
                arm = Arm(config.distill.method, settled(config.mim.mim_weight), ipc)
                plan[arm, seed] = Cell(folder / f"{arm.folder}-seed{seed}", config)
    return plan


def _settings(shared: Config, method: str, weight: float | str, ipc: int, seed: int) -> Config:
    config = dataclasses.replace(
        shared,
        distill=dataclasses.replace(shared.distill, method=method, ipc=ipc),
        mim=dataclasses.replace(shared.mim, mim_weight=None if isinstance(weight, str) else float(weight)),
        eval=dataclasses.replace(shared.eval, baselines=()),
        seed=seed,
    )
    check(config)
    return with_presets(config)


def _earlier(folder: Path, shared: dict[str, Any], comparison: Comparison) -> dict[Key, dict[str, Any]]:
    """Return the outcomes of all cells in the folder of a comparison, also of those not asked for.

    Raises:
        InputError: they are of other settings or images.
    """
    path = folder / "compare.json"
    if not path.exists():
        return {}  # it is not known with what settings they were run
    try:
        settings = json.loads(path.read_text())["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a comparison of mim4dd ({error!r}); give another --out") from error
    if others := differences(settings, shared):
        raise InputError(f"{folder} holds a comparison with other settings: {others}; give another --out")
    found, precision = {}, resolved(plain(comparison)).precision
    for cell in sorted((folder / "cells").glob("*")):
        if outcome := outcome_in(cell):
            refuse_other_images(cell, outcome, comparison)
            if (other := outcome["config"].get("precision", precision)) != precision:
                raise InputError(
                    f"{cell} was computed in {other}, but this machine uses {precision} by default; "
                    f"give --precision {other}, or another --out"
                )
            found[Arm.of(outcome), outcome["config"]["seed"]] = outcome
    return found


def time_left(plan: Mapping[Key, Cell], outcomes: Mapping[Key, dict[str, Any]]) -> str:
    """Return how long the other cells will take, going by those of the same method and IPC, or by all."""
    alike: dict[tuple[str, int], list[float]] = {}
    for (arm, _), outcome in outcomes.items():
        if "seconds" in outcome:
            alike.setdefault((arm.name, arm.ipc), []).append(sum(outcome["seconds"].values()))
    runs = [seconds for (name, _), took in alike.items() if name in METHODS for seconds in took]
    if not runs:
        return ""
    left = sum(
        statistics.fmean(alike.get((arm.name, arm.ipc), runs))
        for arm, seed in plan
        if (arm, seed) not in outcomes
    )
    return f"; {about(left)} left"


if __name__ == "__main__":
    sys.exit(main())
