"""One run of many, a cell: in a folder of its own, recognised by its settings once it is finished."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..commands import scoring
from ..commands.checkpoint import STATE, Checkpoint
from ..commands.config_json import to_json
from ..commands.console import complain, with_accuracy
from ..commands.presets import with_presets
from ..commands.report import RESULT
from ..commands.runner import prepared_experiment, run, score_facts
from ..config import Config, DistillConfig, MimConfig, settled
from ..data import load
from ..devices import device_name
from ..distill import DivergenceError
from ..errors import InputError
from ..experiment import resolved
from ..files import write
from ..synthetic import IMAGES, SyntheticSet

FAILED = "failed.json"
IRRELEVANT = ("config", "out", "overwrite", "preset", "quick")  # to the result, once defaults are filled in
_load = functools.lru_cache(maxsize=1)(load)  # the cells of a process share their data


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        folder: of its files, as `mim4dd.run` leaves them.
        config: with defaults filled in.
    """

    folder: Path
    config: Config

    def found(self) -> dict[str, Any] | None:
        """Return what an earlier run left: a result, or {"failed": why}; None if it did not get to the end.

        Raises:
            InputError: the folder holds a run of other settings or images, or no readable one.
        """
        outcome = facts = outcome_in(self.folder)
        if facts is None and (self.folder / IMAGES).exists():
            facts = SyntheticSet.load(self.folder / IMAGES).metadata
            if "config" not in facts:
                raise InputError(f"{self.folder / IMAGES} is not from a mim4dd run; remove its folder")
        if facts is not None:
            refuse_others(self.folder, facts["config"], self.config)
            refuse_other_images(self.folder, facts, self.config)
        return outcome

    def run(self) -> dict[str, Any]:
        """Run it, or resume it, and return what `found` will find from now on.

        Raises:
            InputError: the data or the device do not go with the settings.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            return self._outcome()
        except DivergenceError as error:
            complain(str(error))
            return self._write(FAILED, {"failed": str(error)})

    def _outcome(self) -> dict[str, Any]:
        checkpoint = None
        if (self.folder / STATE).exists():
            try:
                checkpoint = Checkpoint.load(self.folder)
            except InputError as error:
                complain(f"{error}; the run starts over")
        return run(prepared_experiment(self.config, _load), self.folder, checkpoint)

    def _write(self, name: str, outcome: dict[str, Any]) -> dict[str, Any]:
        config = to_json(resolved(self.config))
        outcome = {**outcome, "data": fingerprint(self.config), "version": __version__, "config": config}
        write(self.folder / name, json.dumps(outcome, indent=2))
        return outcome


@dataclass(frozen=True)
class BaselineCell(Cell):
    """The score of real images instead of distilled ones: "random" or "kmeans"."""

    baseline: str

    @classmethod
    def of(cls, folder: Path, baseline: str, config: Config) -> BaselineCell:
        """Return the baseline for runs like `config`, with only the settings that change its score.

        The method does not: an augmentation that is not given is the default one, even beside a method that
        has none.
        """
        ours = config.distill
        bare = DistillConfig(
            ipc=ours.ipc,
            network=ours.network,
            width=ours.width,
            augmentation=ours.augmentation,
            init="noise",
            image_lr=1.0,
        )
        settings = Config(
            data=config.data,
            distill=bare,
            mim=MimConfig(mim_weight=0.0),
            eval=dataclasses.replace(config.eval, baselines=(), eval_archs=()),
            seed=config.seed,
            device=config.device,
            precision=config.precision,
            preset=config.preset,
            quick=config.quick,
        )
        return cls(folder, with_presets(settings), baseline)

    def _outcome(self) -> dict[str, Any]:
        experiment = prepared_experiment(self.config, _load)
        began = time.monotonic()
        score = with_accuracy(
            f"evaluate ({self.baseline})",
            settled(self.config.eval.num_eval),
            functools.partial(scoring.baseline, experiment, self.baseline),
        )
        facts = {
            "dataset": experiment.name,
            "baseline": self.baseline,
            "ipc": self.config.distill.ipc,
            "seed": self.config.seed,
            **score_facts(score),
            "evaluated_on": experiment.evaluated_on,
            "seconds": {"evaluate": round(time.monotonic() - began, 1)},
            "device": device_name(experiment.device),
        }
        return self._write(RESULT, facts)


def outcome_in(folder: Path) -> dict[str, Any] | None:
    """Return what a run left in `folder`: a result, or {"failed": why}; None if it did not get to the end.

    Raises:
        InputError: it is no readable one.
    """
    path = next((p for p in (folder / RESULT, folder / FAILED) if p.exists()), None)
    if path is None:
        return None
    try:
        outcome = json.loads(path.read_text())
        outcome["config"]["distill"]  # every result of ours has it
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is not a result of mim4dd ({error!r}); remove its folder") from error
    return outcome


def finished(folder: Path) -> set[Path]:
    """Return the folders in `folder` of runs that got to the end."""
    return {path.parent for name in (RESULT, FAILED) for path in folder.glob(f"*/{name}")}


def fingerprint(config: Config) -> str:
    """Return the fingerprint of the training images that the settings name.

    Raises:
        InputError: they cannot be loaded.
    """
    train, _ = _load(config.data.dataset, config.data.data_dir, config.data.image_size)
    return train.fingerprint


def rehearse(config: Config) -> None:
    """Load the data and set up a run with these settings, so that mistakes are found before any work.

    Raises:
        InputError: the data or the device do not go with the settings.
    """
    cheap = dataclasses.replace(config.distill, init="noise")
    prepared_experiment(dataclasses.replace(config, distill=cheap), _load)


def refuse_foreign(folder: Path, own: Collection[str]) -> None:
    """Refuse a folder of --out that holds files, but none of a study's own: it would write among them.

    Raises:
        InputError: there is such a file.
    """
    there = sorted(path.name for path in folder.glob("[!.]*")) if folder.is_dir() else []
    if there and not {*there} & {*own}:
        raise InputError(f"--out {folder} holds {there[0]}, which is of something else; give another folder")


def refuse_others(folder: Path, settings: dict[str, Any], config: Config) -> None:
    """Check that `settings`, found in `folder`, are those of `config`.

    Raises:
        InputError: they are not; it names the first few that differ.
    """
    if others := differences(settings, to_json(resolved(config)), IRRELEVANT):
        raise InputError(
            f"{folder} holds a run with other settings: {others}; give another --out, or remove that folder"
        )


def refuse_other_images(folder: Path, facts: dict[str, Any], config: Config) -> None:
    """Check that a run whose `facts` were found in `folder` was on the training images that `config` names.

    Raises:
        InputError: it was not.
    """
    data = facts.get("data")  # missing in older ones
    if data and data != fingerprint(config):
        raise InputError(
            f"{folder} holds a run on other images of {config.data.dataset}; give another --out, or remove "
            "that folder"
        )


def differences(there: dict[str, Any], here: dict[str, Any], irrelevant: Sequence[str] = ()) -> str:
    """Return the first few settings of a file that differ from the given, for people; "" if there are none.

    A setting newer than the file had its default there. The memory budget may differ: all draws are
    the same with another one, and results change in their last bits at most.
    """
    default, there, here = (_flat(settings) for settings in (to_json(Config()), there, here))
    there = {name: there.get(name, default.get(name)) for name in {**here, **there}}
    irrelevant = ("memory_budget", *irrelevant)
    others = [n for n in there if n not in irrelevant and there[n] != here.get(n)]
    shown = ", ".join(f"{name} {there[name]} (now {here.get(name)})" for name in others[:3])
    return shown + (", ..." if others[3:] else "")


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat.update(_flat(value) if isinstance(value, dict) else {name: value})
    return flat
