"""Every setting of a run, typed, one class per concern, for the command line and the saved result alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from .errors import InputError
from .networks.precision import Precision

T = TypeVar("T")


@dataclass(frozen=True)
class DataConfig:
    """The real images.

    Attributes:
        dataset: A named set (digits, fashion-mnist, mnist, kmnist, cifar10, cifar100, svhn, tiny-imagenet) or
            the path of a folder of pictures, an .npz file or parquet file(s).
        data_dir: Folder with the files of a named set; default: the usual folders, then a download.
        image_size: Resize every image to this many pixels a side; pictures are cropped to a square first.
        zca: Whiten the images (ZCA), as trajectory matching is often run on colour images.
        validation: Fraction of the training images to hold out; accuracy is reported on it instead of the
            test set. For tuning.
    """

    dataset: str = "digits"
    data_dir: Path | None = None
    image_size: int | None = None
    zca: bool = False
    validation: float = 0.0


@dataclass(frozen=True)
class DistillConfig:
    """The distillation. Defaults come from a preset for the data set and the IPC.

    Attributes:
        method: Base method: dm (distribution matching), dc (gradient matching), dsa (dc with augmentation),
            mtt (trajectory matching) or ncfm (characteristic function matching).
        ipc: Images per class.
        factor: Every image holds factor x factor smaller ones, enlarged before use (multi-formation).
        soft_labels: Give every image probabilities for all classes instead of one label. They are learned
            with the image, or, for methods that use no targets (dm, ncfm), taken at the end from a network
            trained on real images.
        iterations: Update steps of the images; default: 200, with --preset paper as the method was published.
        init: Start from random real images, from those nearest to k-means centres, or from noise; default:
            kmeans, or real with --preset paper.
        real_batch: Real images per class and iteration; default: 128, with --preset paper 256. A term with
            networks of its own compares at most 64.
        image_lr: Learning rate of the images; default: 1 for dm, 100 for mtt, 0.1 for the others; at fifty or
            more images per class, unless --preset is paper, 5 for dm and 0.5 for dsa and ncfm.
        image_momentum: Momentum of the images' updates.
        network: Architecture that is matched and evaluated: convnet, convnet-bn, mlp, lenet, alexnet, vgg11
            or resnet18.
        width: Channels of the ConvNet's blocks; default: 64, with --preset paper 128.
        augmentation: Parts of the siamese augmentation joined by "_", or none; default: all (without flip for
            characters), but none for dc.
    """

    method: str = "dm"
    ipc: int = 1
    factor: int = 1
    soft_labels: bool = False
    iterations: int | None = None
    init: Literal["real", "kmeans", "noise"] | None = None
    real_batch: int | None = None
    image_lr: float | None = None
    image_momentum: float = 0.5
    network: str = "convnet"
    width: int | None = None
    augmentation: str | None = None


@dataclass(frozen=True)
class MimConfig:
    """The mutual-information term.

    Attributes:
        mim_weight: Weight of the term; 0 leaves it out. Default for info-nce: 300 for dm (100 from ten images
            per class on, 30 from fifty on); 1000 for dc, dsa and ncfm (300 for dsa and ncfm from fifty
            on); 0.1 for mtt at one image per class, else 0. For nce: 100 for dm (1 from ten images per class
            on), and for dsa at one, else 0; on digits a tenth of that.
        mim_loss: info-nce: classify each real image by its similarity to the synthetic ones. nce: the
            published term, which scores every pair of a real and a synthetic image.
        mim_networks: Networks whose features the term compares: its own, briefly trained on the current
            synthetic images (synthetic) or on real images (real), or those of the base method (base).
        mim_pairs: Which real images a synthetic image is paired with: those of its class, or those of its
            cluster (k-means within the class, one cluster per synthetic image).
        mim_layers: Feature maps to compare: all, last, or indices such as 0,2.
        mim_layer_decay: Weight of each layer relative to the next deeper one.
        mim_temperature: Temperature of the cosine similarities; default: 0.03 for info-nce, 0.1 for nce.
        mim_noise_ratio: Noise ratio of nce; calibrated: measured on the first batch.
        mim_projection: Linear map of the features into a common contrastive space.
        mim_projection_size: Width of that space.
        mim_symmetric: Also add the term with real and synthetic images swapped.
    """

    mim_weight: float | None = None
    mim_loss: Literal["info-nce", "nce"] = "info-nce"
    mim_networks: Literal["synthetic", "real", "base"] = "synthetic"
    mim_pairs: Literal["class", "cluster"] = "class"
    mim_layers: str = "all"
    mim_layer_decay: float = 1.0
    mim_temperature: float | None = None
    mim_noise_ratio: float | Literal["calibrated"] = "calibrated"
    mim_projection: Literal["none", "random", "trained"] = "none"
    mim_projection_size: int = 128
    mim_symmetric: bool = False

    def layers(self) -> str | list[int]:
        """Return what --mim-layers says: "all", "last" or indices.

        Raises:
            InputError: it says something else.
        """
        if self.mim_layers in ("all", "last"):
            return self.mim_layers
        try:
            return [int(k) for k in self.mim_layers.split(",")]
        except ValueError as error:
            raise InputError(
                f"--mim-layers is {self.mim_layers!r}, expected all, last or indices such as 0,2"
            ) from error


@dataclass(frozen=True)
class TrajectoryConfig:
    """Trajectory matching (mtt): its experts, which are stored and reused, and how they are matched.

    Attributes:
        experts: Folder to keep experts in, or one file of experts to use as it is, however they were trained;
            default: experts in $MIM4DD_CACHE, or ~/.cache/mim4dd.
        num_experts: How many experts to train.
        expert_snapshots: Snapshots of each expert, besides the one before training.
        expert_batches: Batches of 256 images between two snapshots; 0: an epoch.
        expert_seed: Seed of their weights, batches and augmentations; the same for every --seed, so that runs
            share them.
        max_start: How many snapshots, counted from the first, a match may start from.
        span: Snapshots from the start of a match to its target.
        student_steps: Steps on the synthetic images that should reach the target.
        student_batch: Images per step; default: all.
        student_lr: Initial size of those steps; it is learned.
        student_lr_rate: Learning rate of the logarithm of that size.
    """

    experts: Path | None = None
    num_experts: int | None = None
    expert_snapshots: int | None = None
    expert_batches: int | None = None
    expert_seed: int = 0
    max_start: int | None = None
    span: int = 2
    student_steps: int | None = None
    student_batch: int | None = None
    student_lr: float = 0.01
    student_lr_rate: float = 0.1


@dataclass(frozen=True)
class EvalConfig:
    """The evaluation: networks trained from scratch on the synthetic images.

    Attributes:
        num_eval: Networks trained per result; 0: no evaluation. Default: 5, or 20 with --preset paper.
        eval_epochs: Epochs of each; default: 300, or 1000 with --preset paper (300 if without augmentation).
        baselines: Baselines. At equal IPC: random real images, those nearest to k-means centres, the base
            method without the mutual-information term. full: one network trained on all images, for a
            twentieth of the epochs and at least 5.
        eval_archs: Other architectures to score the distilled set on, such as
            mlp,lenet,alexnet,vgg11,resnet18.
    """

    num_eval: int | None = None
    eval_epochs: int | None = None
    baselines: tuple[Literal["random", "kmeans", "base", "full"], ...] = ("random",)
    eval_archs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = ",".join(self.eval_archs).split(",")  # mlp,lenet is as good as mlp lenet
        object.__setattr__(self, "eval_archs", tuple(dict.fromkeys(name for name in names if name)))


@dataclass(frozen=True)
class Config:
    """All settings of a run.

    Attributes:
        seed: Seed of every random draw. Results repeat on the same machine with the same number of threads;
            on a GPU only with a ConvNet and without --factor.
        device: auto, cpu, cuda, cuda:1, ...
        precision: What the networks compute in; auto: the fastest for a ConvNet. Weights, losses and
            distances are always float32.
        memory_budget: GiB of GPU memory that passes over real images may take; the steps of mtt may take half
            as much. Default: half of the free memory. Batch normalisation still takes its images at once.
        out: Folder of the results; default: runs/<dataset>-<method>-ipc<n>-<seed>, or the next free name.
        overwrite: Replace what --out already holds.
        preset: short: minutes on a laptop. paper: the sizes of the published protocols (20,000 iterations of
            dm, 256 real images a class, width 128, 1000 epochs), for a GPU. What still differs from the
            papers, such as the term and most settings of mtt and ncfm, is listed in docs/runs.md.
        quick: Smoke test in seconds: every size not given is the smallest. Its accuracies mean nothing.
        config: JSON file of settings, such as an earlier result.json; command-line options override it. A
            result.json sets every option, so with another --method also give --image-lr, --augmentation
            and --mim-weight.
    """

    data: DataConfig = field(default_factory=DataConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    mim: MimConfig = field(default_factory=MimConfig)
    trajectory: TrajectoryConfig = field(default_factory=TrajectoryConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    seed: int = 0
    device: str = "auto"
    precision: Precision = "auto"
    memory_budget: float | None = None
    out: Path | None = None
    overwrite: bool = False
    preset: Literal["short", "paper"] = "short"
    quick: bool = False
    config: Path | None = None


def settled(value: T | None) -> T:
    """Return a setting that `with_presets` has filled in."""
    assert value is not None
    return value
