"""From a checked configuration to distilled images and scores, without a word to the terminal or the disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import memory, precision, synthetic
from .config import Config, layers, settled
from .data import ImageSet, load
from .distill import Progress, distill
from .errors import InputError
from .evaluate import OnNetwork, Protocol, Score, evaluate
from .networks import CHUNK
from .objectives import METHODS, MutualInformation, Problem
from .objectives.mutual_information import layer_indices
from .seeding import generator
from .synthetic import SyntheticSet

FULL_EPOCHS = 20  # full data: this fraction of the epochs, but at least 5; and one network


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One distillation: the settings, what is to be matched, and the synthetic images to start from.

    Attributes:
        config: with no setting left open, the precision that was picked included.
        problem: the real images and how they are looked at, on the device of the run.
        test: what accuracies are measured on, also there.
        start: the synthetic set before the first update.
    """

    config: Config
    problem: Problem
    test: ImageSet
    start: SyntheticSet

    @classmethod
    def prepare(cls, config: Config) -> Experiment:
        """Load the data and draw the images to start from.

        Raises:
            InputError: whatever is wrong with the data, the device, or the settings for these data.
        """
        device = pick_device(config.device)
        config = dataclasses.replace(config, precision=precision.resolve(config.precision, device))
        precision.allow_tf32(config.precision)
        train, test = load(config.data.dataset, config.data.data_dir, config.data.image_size)
        if config.data.validation:
            train, test = train.split(config.data.validation, generator(config.seed, "validation"))
        train, test = train.to(device), test.to(device)
        start = synthetic.initialise(
            train, config.distill.ipc, settled(config.distill.init), generator(config.seed, "init", device)
        )
        problem = Problem(
            real=train,
            labels=start.labels,
            architecture=config.distill.network,
            width=settled(config.distill.width),
            real_batch=settled(config.distill.real_batch),
            augmentation=settled(config.distill.augmentation),
            layers=(),
            seed=config.seed,
            precision=config.precision,
            memory=memory.budget(config.memory_budget, device),
        )
        if config.mim.mim_weight:
            problem = dataclasses.replace(problem, layers=_layers(problem, config))
        return cls(config, problem, test, start)

    @property
    def name(self) -> str:
        """The name of the data set, for people and files."""
        dataset = self.config.data.dataset
        return Path(dataset).stem if Path(dataset).exists() else dataset

    @property
    def train(self) -> ImageSet:
        """The real training images."""
        return self.problem.real

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.train.images.device

    @property
    def footprint(self) -> tuple[int, int]:
        """How many real images go through a network at once, and about how many bytes all maps take.

        That is a pass over so many, what is kept of all real images, and the synthetic ones with gradients.
        """
        problem = self.problem
        network, image = problem.network(), (self.train.channels, *self.train.image_size)
        real = self.train.num_classes * problem.real_batch
        at_once = min(problem.chunk, real)
        kept = sum(network.feature_sizes[k] for k in {len(network.feature_sizes) - 1, *problem.layers})
        passing = at_once * memory.per_image(network, image, gradients=False)
        synthetic_maps = len(problem.labels) * memory.per_image(network, image, gradients=True)
        return at_once, passing + 4 * kept * real + synthetic_maps

    def mutual_information(self) -> MutualInformation:
        """Return a new add-on, by the settings."""
        mim = self.config.mim
        return MutualInformation(
            weight=settled(mim.mim_weight),
            layers=[*self.problem.layers],
            layer_decay=mim.mim_layer_decay,
            temperature=mim.mim_temperature,
            noise_ratio=mim.mim_noise_ratio,
            projection=mim.mim_projection,
            projection_size=mim.mim_projection_size,
            feature_sizes=self.problem.network().feature_sizes,
            generator=generator(self.config.seed, "projection", self.device),
            symmetric=mim.mim_symmetric,
        )

    def distill(self, on_progress: Callable[[Progress], None], *, with_mim: bool = True) -> Tensor:
        """Return distilled images [n, C, H, W]; `with_mim=False` runs the base method alone.

        Raises:
            DivergenceError: a term of the loss is not finite any more.
        """
        settings = self.config.distill
        return distill(
            METHODS[settings.method].objective(self.problem),
            self.start.images,
            iterations=settled(settings.iterations),
            lr=settled(settings.image_lr),
            momentum=settings.image_momentum,
            mutual_information=self.mutual_information() if with_mim and self.config.mim.mim_weight else None,
            on_progress=on_progress,
        )

    def score(self, images: Tensor, on_network: OnNetwork) -> Score:
        """Evaluate synthetic images [n, C, H, W], class by class."""
        return self._evaluate(lambda _: (images, self.start.labels), on_network)

    def baseline(self, name: str, on_network: OnNetwork) -> Score:
        """Evaluate real images: "random" (new ones for every network), "kmeans" or "full"."""
        real, ipc, seed = self.train, self.config.distill.ipc, self.config.seed
        if name == "full":
            images = real.batch(torch.arange(len(real), device=self.device))
            return self._evaluate(lambda _: (images, real.labels), on_network, full=True)
        if name == "kmeans":
            index = synthetic.select_kmeans(real, ipc, generator(seed, "baseline/kmeans", self.device))
            return self.score(real.batch(index.flatten()), on_network)

        def draw(k: int) -> tuple[Tensor, Tensor]:
            index = synthetic.select_random(real, ipc, generator(seed, f"baseline/random/{k}", self.device))
            return real.batch(index.flatten()), self.start.labels

        return self._evaluate(draw, on_network)

    def _evaluate(
        self,
        training_set: Callable[[int], tuple[Tensor, Tensor]],
        on_network: OnNetwork,
        full: bool = False,
    ) -> Score:
        settings, epochs = self.config.distill, settled(self.config.eval.eval_epochs)
        protocol = Protocol(
            epochs=max(5, epochs // FULL_EPOCHS) if full else epochs,
            augmentation=settled(settings.augmentation),
            architecture=settings.network,
            width=settled(settings.width),
            precision=self.config.precision,
        )
        return evaluate(
            training_set,
            self.test,
            protocol,
            num_networks=1 if full else settled(self.config.eval.num_eval),
            seed=self.config.seed,
            on_network=on_network,
        )


def _layers(problem: Problem, config: Config) -> list[int]:
    try:
        return layer_indices(layers(config.mim), len(problem.network().feature_sizes))
    except ValueError as error:
        raise InputError(f"--mim-layers is {config.mim.mim_layers}; {error}") from error


def pick_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is a GPU where there is one.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type not in CHUNK:
            raise RuntimeError("neither a CPU nor a CUDA device")
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} is not to be had here; use cpu or auto") from error
    return device
