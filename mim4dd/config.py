"""Every setting of a run, typed, one class per concern: the command line and the saved result in one."""

from __future__ import annotations

import dataclasses
import json
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from .augment import parts_of
from .errors import InputError, unknown
from .networks import ARCHITECTURES
from .networks.precision import Precision
from .objectives import METHODS, TrajectoryConfig

T = TypeVar("T")
FLOAT32_MAX = 3.4e38


@dataclass(frozen=True)
class DataConfig:
    """The real images."""

    dataset: str = "digits"
    """A named set (digits, fashion-mnist, mnist, kmnist, cifar10, cifar100, svhn, tiny-imagenet) or the path
    of a folder of pictures, an .npz or parquet file(s)."""
    data_dir: Path | None = None
    """Where the files of a named set lie; by default the usual folders, else they are fetched."""
    image_size: int | None = None
    """Make every image this many pixels a side: resized, and pictures cut to a square first."""
    zca: bool = False
    """Whiten the images (ZCA), as trajectory matching is often run on colour images."""
    validation: float = 0.0
    """Hold out this share of the training images and report on it, not on the test set: to tune."""


@dataclass(frozen=True)
class DistillConfig:
    """The distillation. What is not given comes from a preset for the data set and the IPC."""

    method: str = "dm"
    """Base method: dm (distribution matching), dc (gradient matching), dsa (dc with augmentation), mtt
    (trajectory matching) or ncfm (characteristic function matching)."""
    ipc: int = 1
    """Images per class."""
    factor: int = 1
    """Every image holds factor x factor smaller ones, enlarged before use (multi-formation)."""
    soft_labels: bool = False
    """Every image has probabilities for all classes, not one label. They are learned with it, or, by methods
    that use no targets (dm, ncfm), taken from a network trained on real images at the end."""
    iterations: int | None = None
    """Update steps of the images; default: 200, with --preset paper as the method was published."""
    init: Literal["real", "kmeans", "noise"] | None = None
    """Start from random real images, from those nearest to k-means centres, or from noise; default: kmeans,
    with --preset paper real."""
    real_batch: int | None = None
    """Real images per class and iteration; default: 128, with --preset paper 256."""
    image_lr: float | None = None
    """Learning rate of the images; default: 1 for dm, 100 for mtt, 0.1 for the others; from fifty images per
    class on, unless --preset is paper, 5 for dm and 0.5 for ncfm."""
    image_momentum: float = 0.5
    """Momentum of the images' updates."""
    network: str = "convnet"
    """Architecture that is matched and evaluated: convnet, convnet-bn, mlp, lenet, alexnet, vgg11 or
    resnet18."""
    width: int | None = None
    """Channels of the ConvNet's blocks; default: 64, with --preset paper 128."""
    augmentation: str | None = None
    """Parts of the siamese augmentation joined by "_", or none; default: all, but no flip for characters,
    and none for dc."""


@dataclass(frozen=True)
class MimConfig:
    """The mutual-information term."""

    mim_weight: float | None = None
    """Its weight; 0 leaves it out. Default, for info-nce: 300 for dm, from ten images per class on 100, from
    fifty on 30; 1000 for dc, dsa and ncfm, from fifty on 300 for ncfm; 1 for mtt at one image per class,
    else 0."""
    mim_loss: Literal["info-nce", "nce"] = "info-nce"
    """info-nce: every real image is to find its class among the synthetic ones. nce: the published term, a
    critic of every pair."""
    mim_networks: Literal["synthetic", "real", "base"] = "synthetic"
    """Whose features it compares: those of networks of its own, trained for a moment on the synthetic images
    as they are by then, or on the real ones; or those of the networks that the base method looks through."""
    mim_pairs: Literal["class", "cluster"] = "class"
    """Which real images an image is paired with: those of its class, or of its cluster (k-means, one cluster
    of its class for every synthetic image)."""
    mim_layers: str = "all"
    """Feature maps it compares: all, last, or indices such as 0,2."""
    mim_layer_decay: float = 1.0
    """Factor of the weight from a layer to the one before it."""
    mim_temperature: float | None = None
    """Temperature of its cosines; default: 0.03 for info-nce, 0.1 for nce."""
    mim_noise_ratio: float | Literal["calibrated"] = "calibrated"
    """Noise ratio of the critic of nce; calibrated: measured on the first batch."""
    mim_projection: Literal["none", "random", "trained"] = "none"
    """Linear map of the features into a common contrastive space."""
    mim_projection_size: int = 128
    """Width of that space."""
    mim_symmetric: bool = False
    """Add the term with real and synthetic exchanged."""


@dataclass(frozen=True)
class EvalConfig:
    """The evaluation: networks trained from nothing on the synthetic images."""

    num_eval: int | None = None
    """Networks trained per result; 0: no evaluation. Default: 5, with --preset paper 20."""
    eval_epochs: int | None = None
    """Epochs of each; default: 300, with --preset paper 1000 (without augmentation 300)."""
    baselines: tuple[Literal["random", "kmeans", "base", "full"], ...] = ("random",)
    """Compared at equal IPC: random real images, those nearest to k-means centres, the base method without
    the mutual-information term; and the full data: one network, trained on all images for a twentieth of the
    epochs, at least 5."""
    eval_archs: tuple[str, ...] = ()
    """Architectures the distilled set is scored on as well, such as mlp,lenet,alexnet,vgg11,resnet18."""

    def __post_init__(self) -> None:
        names = ",".join(self.eval_archs).split(",")  # mlp,lenet is as good as mlp lenet
        object.__setattr__(self, "eval_archs", tuple(dict.fromkeys(name for name in names if name)))


@dataclass(frozen=True)
class Config:
    """Distil a labelled image set into a few synthetic images per class."""

    data: DataConfig = field(default_factory=DataConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    mim: MimConfig = field(default_factory=MimConfig)
    trajectory: TrajectoryConfig = field(default_factory=TrajectoryConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    seed: int = 0
    """Of every random draw; the same seed gives the same set on the same machine with as many threads (on a
    GPU with a ConvNet and no --factor: there torch's enlarging and adaptive pooling are not repeatable)."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    precision: Precision = "auto"
    """What the networks compute in; auto: the fastest for a ConvNet. Weights, losses and distances are
    float32 in any case."""
    memory_budget: float | None = None
    """GiB of GPU memory that the passes over real images may take; default: half of what is free."""
    out: Path | None = None
    """Folder of the results; default: runs/<dataset>-<method>-ipc<n>-<seed>, or the next free name."""
    overwrite: bool = False
    """Write into --out even if it holds a result."""
    preset: Literal["short", "paper"] = "short"
    """short: minutes on a laptop. paper: the sizes of the published protocols (20,000 iterations of dm, 256
    real images a class, width 128, 1000 epochs), for a GPU. Ours in any case: the learning rate of mtt's
    images (published 1000), the frequencies of ncfm (1024, published 4096), and the term: --mim-weight 0
    leaves it out, --mim-loss nce --mim-networks base is the published one."""
    quick: bool = False
    """A smoke run of seconds: the smallest of everything that is not given."""
    config: Path | None = None
    """A JSON file of settings, such as an earlier result.json; the command line goes before it. A result.json
    leaves nothing open: with another method, give what goes with that too (--image-lr, --augmentation,
    --mim-weight)."""


def settled(value: T | None) -> T:
    """Return a setting that `with_presets` has filled in."""
    assert value is not None
    return value


def check(config: Config) -> None:
    """Refuse settings that cannot be meant, before any work starts.

    Raises:
        InputError: naming the option, its value and what was expected.
    """
    if config.distill.method not in METHODS:
        raise unknown("method", config.distill.method, METHODS)
    if config.distill.network not in ARCHITECTURES:
        raise unknown("network", config.distill.network, ARCHITECTURES)
    for name in config.eval.eval_archs:
        if name not in ARCHITECTURES:
            raise unknown("architecture in --eval-archs:", name, ARCHITECTURES)
    at_least = {
        "--ipc": (config.distill.ipc, 1),
        "--factor": (config.distill.factor, 1),
        "--iterations": (config.distill.iterations, 0),
        "--real-batch": (config.distill.real_batch, 1),
        "--width": (config.distill.width, 1),
        "--num-eval": (config.eval.num_eval, 0),
        "--eval-epochs": (config.eval.eval_epochs, 1),
        "--mim-weight": (config.mim.mim_weight, 0),
        "--num-experts": (config.trajectory.num_experts, 1),
        "--expert-snapshots": (config.trajectory.expert_snapshots, 1),
        "--expert-batches": (config.trajectory.expert_batches, 0),
        "--max-start": (config.trajectory.max_start, 1),
        "--span": (config.trajectory.span, 1),
        "--student-steps": (config.trajectory.student_steps, 1),
        "--student-batch": (config.trajectory.student_batch, 1),
        "--mim-projection-size": (config.mim.mim_projection_size, 1),
    }
    for option, (value, least) in at_least.items():
        if value is not None and not least <= value < FLOAT32_MAX:
            raise InputError(f"{option} is {value}, expected a number of at least {least}")
    above_zero = {
        "--image-lr": config.distill.image_lr,
        "--student-lr": config.trajectory.student_lr,
        "--student-lr-rate": config.trajectory.student_lr_rate,
        "--memory-budget": config.memory_budget,
        "--mim-temperature": config.mim.mim_temperature,
        "--mim-noise-ratio": config.mim.mim_noise_ratio,
        "--mim-layer-decay": config.mim.mim_layer_decay,
    }
    for option, number in above_zero.items():
        if isinstance(number, int | float) and not 0 < number < FLOAT32_MAX:
            raise InputError(f"{option} is {number}, expected a positive number")
    if config.eval.num_eval == 0 and config.eval.eval_archs:
        raise InputError(f"--num-eval is 0, which scores nothing on --eval-archs {config.eval.eval_archs[0]}")
    if not 0 <= config.distill.image_momentum < 1:
        raise InputError(f"--image-momentum is {config.distill.image_momentum}, expected 0 up to 1")
    if config.mim.mim_loss != "nce" and config.mim.mim_noise_ratio != "calibrated":
        raise InputError(
            f"--mim-noise-ratio is {config.mim.mim_noise_ratio}, but only --mim-loss nce has one, and it is "
            f"{config.mim.mim_loss}"
        )
    if config.data.zca and config.distill.factor > 1:
        raise InputError("--zca mixes all pixels of an image, --factor takes it apart: use one of them")
    if not 0 <= config.data.validation < 1:
        raise InputError(f"--validation is {config.data.validation}, expected a share from 0 up to 1")
    if config.distill.augmentation is not None:
        try:
            parts_of(config.distill.augmentation)
        except ValueError as error:
            raise InputError(f"--augmentation: {str(error).removeprefix('mim4dd.augment: ')}") from error
    layers(config.mim)


def layers(mim: MimConfig) -> str | list[int]:
    """Return what --mim-layers says: "all", "last" or indices.

    Raises:
        InputError: it says something else.
    """
    if mim.mim_layers in ("all", "last"):
        return mim.mim_layers
    try:
        return [int(k) for k in mim.mim_layers.split(",")]
    except ValueError as error:
        raise InputError(
            f"--mim-layers is {mim.mim_layers!r}, expected all, last or indices such as 0,2"
        ) from error


def to_json(config: Config) -> dict[str, Any]:
    """Return the settings as JSON-able values; `from_json` reads them back."""
    settings = dataclasses.asdict(config)
    del settings["config"]  # its settings are all in here
    return json.loads(json.dumps(settings, default=str))


def read_config(path: Path) -> Config:
    """Read settings from a JSON file of `to_json`'s form, or from a result.json that holds one as "config".

    Where that result was written is not taken over.

    Raises:
        InputError: no such file, not JSON, an unknown setting, or a value that it cannot have.
    """
    try:
        settings = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"--config {path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"--config {path} is not JSON ({error})") from error
    config = from_json(
        settings.get("config", settings) if isinstance(settings, dict) else settings, str(path)
    )
    return dataclasses.replace(config, out=None, overwrite=False)


def from_json(settings: Any, source: str) -> Config:
    """Return the configuration that `to_json` made `settings` of; `source` names it in errors.

    Raises:
        InputError: an unknown setting, a value that it cannot have, or no settings at all.
    """
    return _from_json(Config, settings, source)


def _checked(name: str, value: Any, kind: Any, where: str) -> Any:
    """Return a value of JSON as one of type `kind`."""
    try:
        if isinstance(value, bool) and kind is not bool:
            raise TypeCheckError("a truth value")
        if isinstance(value, str) and Path in typing.get_args(kind):
            value = Path(value)
        elif isinstance(value, list):
            value = tuple(value)
        return check_type(value, kind, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
    except TypeCheckError as error:
        expected = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
        raise InputError(f"{where}: {name} is {json.dumps(value)}, expected {expected}") from error


def _from_json(kind: Any, settings: Any, where: str) -> Any:
    if not isinstance(settings, dict):
        raise InputError(f"{where}: expected an object of settings, got {settings!r}")
    types = typing.get_type_hints(kind)
    values = {}
    for name, value in settings.items():
        if name not in types:
            raise unknown(f"setting in {where}:", name, types)
        if dataclasses.is_dataclass(types[name]):
            value = _from_json(types[name], value, where)
        else:
            value = _checked(name, value, types[name], where)
        values[name] = value
    return kind(**values)
