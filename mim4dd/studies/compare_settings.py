"""Options of `mim4dd.compare`: the methods, weights, IPCs and seeds, and what all runs share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..commands.config_json import to_json
from ..commands.options import Hidden, plain
from ..config import Config, DistillConfig, EvalConfig, MimConfig


@dataclass(frozen=True)
class SharedDistillConfig(DistillConfig):
    """The distillation. Defaults come from a preset for the data set and the IPC."""

    method: Hidden[str] = "dm"
    ipc: Hidden[int] = 1


@dataclass(frozen=True)
class SharedMimConfig(MimConfig):
    """The mutual-information term."""

    mim_weight: Hidden[float | None] = None


@dataclass(frozen=True)
class SharedEvalConfig(EvalConfig):
    """The evaluation: networks trained from scratch on the synthetic images.

    Attributes:
        baselines: Compared at equal IPC, once per seed: random real images, and those nearest to k-means
            centres.
    """

    baselines: tuple[Literal["random", "kmeans"], ...] = ("random",)


@dataclass(frozen=True)
class Comparison(Config):
    """Compare base methods with and without mutual information, paired by seed.

    Every combination of --methods, --mim-weights, --ipcs and --seeds is a run in a folder of its own under
    OUT/cells. Finished ones are not run again: the same command continues an interrupted comparison, and one
    with other seeds, weights, methods or IPCs adds to it. The table is OUT/compare.md, .json and .png.

    Attributes:
        methods: Base methods.
        mim_weights: Weights of the mutual-information term; the word default stands for the method's own
            for the data set and the IPC. Differences are to weight 0.
        ipcs: Images per class.
        seeds: Seeds; a single one gives no interval.
        out: Folder of the results; default: runs/compare.
    """

    methods: tuple[str, ...] = ("dm",)
    mim_weights: tuple[float | Literal["default"], ...] = (0.0, "default")
    ipcs: tuple[int, ...] = (1,)
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path | None = None
    distill: SharedDistillConfig = field(default_factory=SharedDistillConfig)
    mim: SharedMimConfig = field(default_factory=SharedMimConfig)
    eval: SharedEvalConfig = field(default_factory=SharedEvalConfig)
    seed: Hidden[int] = 0
    overwrite: Hidden[bool] = False

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.out or Path("runs/compare")

    def shared(self) -> dict[str, Any]:
        """Return the settings of all cells, as JSON-able values."""
        shared = to_json(plain(self))
        del shared["distill"]["method"], shared["distill"]["ipc"], shared["mim"]["mim_weight"]
        del shared["eval"]["baselines"], shared["seed"], shared["out"], shared["overwrite"]
        return shared
