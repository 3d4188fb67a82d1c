"""From a checked configuration to distilled images and scores, without output to terminal or disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor

from .config import Config, settled
from .data import ImageSet, load, name_of
from .data.clusters import cluster_labels, kmeans_centres
from .data.whitening import Whitening
from .devices import pick_device
from .distill import Progress, distill
from .errors import InputError
from .evaluation import Protocol
from .information import held_out_information
from .networks import Network, memory, precision
from .objectives import (
    METHODS,
    MutualInformation,
    Objective,
    Problem,
    ThroughTermNetworks,
    TrainedOnReal,
    TrainedOnSynthetic,
)
from .objectives.footprint import of_term
from .objectives.mutual_information import layer_indices
from .seeding import generator
from .synthetic import SyntheticSet, initialise
from .teacher import probabilities, teach

Load = Callable[..., tuple[ImageSet, ImageSet]]  # as `mim4dd.data.load`


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One distillation: the settings, what to match, and the synthetic images to start from.

    Attributes:
        config: with defaults filled in, including the precision.
        problem: the real images and how to match them, on the device of the run.
        test: the images that accuracies are measured on, also there.
        start: the synthetic set before the first update.
        data: fingerprint of the training images as they were loaded.
        centres: of the clusters that the add-on pairs images by, if it does.
    """

    config: Config
    problem: Problem
    test: ImageSet
    start: SyntheticSet
    data: str
    centres: Tensor | None = None

    @classmethod
    def prepare(cls, config: Config, load: Load = load) -> Experiment:
        """Load the data, by `mim4dd.data.load` or the like, and draw the images to start from.

        Raises:
            InputError: whatever is wrong with the data, the device, or the settings for these data.
        """
        device = pick_device(config.device)
        config = resolved(config)
        precision.configure(config.precision)
        train, test = load(config.data.dataset, config.data.data_dir, config.data.image_size)
        data = train.fingerprint
        if config.data.validation:
            train, test = train.split(config.data.validation, generator(config.seed, "validation"))
        train, test = train.to(device), test.to(device)
        if config.data.zca:
            whitening = Whitening.fit(train.images)
            train, test = train.whitened(whitening), test.whitened(whitening)
        random = generator(config.seed, "init", device)
        centres = None
        if config.mim.mim_pairs == "cluster":
            centres = kmeans_centres(train, config.distill.ipc * config.distill.factor**2, random)
        start = initialise(
            train,
            config.distill.ipc,
            settled(config.distill.init),
            random,
            factor=config.distill.factor,
            centres=centres,
        )
        problem = Problem(
            real=train,
            labels=start.decoded_labels,
            architecture=config.distill.network,
            width=settled(config.distill.width),
            real_batch=settled(config.distill.real_batch),
            augmentation=settled(config.distill.augmentation),
            layers=(),
            seed=config.seed,
            trajectory=config.trajectory,
            partners=None if centres is None else cluster_labels(train, centres),
            precision=config.precision,
            memory=memory.budget(config.memory_budget, device),
        )
        layers = _layers(problem, config)
        if config.mim.mim_weight:
            problem = dataclasses.replace(problem, layers=layers)
        experiment = cls(config, problem, test, start, data, centres)
        experiment.prepare_method()  # starts no work yet, but finds what is wrong with its settings
        return experiment

    @property
    def name(self) -> str:
        """The name of the data set, for people and files."""
        return name_of(self.config.data.dataset)

    @property
    def evaluated_on(self) -> str:
        """Which split the accuracies are of: "test" or "validation"."""
        return "validation" if self.config.data.validation else "test"

    @property
    def train(self) -> ImageSet:
        """The real training images."""
        return self.problem.real

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.train.images.device

    @property
    def footprint(self) -> int:
        """About how many bytes an update takes beside the weights and the data, the term's included."""
        method, problem = METHODS[self.config.distill.method], self.problem
        if not self.config.mim.mim_weight or self.config.mim.mim_networks == "base":
            return method.footprint(problem)
        alone = dataclasses.replace(problem, layers=())
        return method.footprint(alone) + of_term(problem)

    def mutual_information(self) -> MutualInformation:
        """Return a new add-on, as the settings say."""
        mim = self.config.mim
        return MutualInformation(
            loss=mim.mim_loss.replace("-", "_"),
            weight=settled(mim.mim_weight),
            layers=[*self.problem.layers],
            layer_decay=mim.mim_layer_decay,
            temperature=settled(mim.mim_temperature),
            noise_ratio=mim.mim_noise_ratio,
            projection=mim.mim_projection,
            projection_size=mim.mim_projection_size,
            feature_sizes=self.problem.network().feature_sizes,
            generator=generator(self.config.seed, "projection", self.device),
            symmetric=mim.mim_symmetric,
        )

    def prepare_method(self) -> Iterator[tuple[int, int]]:
        """Do what the method needs once and for all, yielding (steps done, steps in all)."""
        return METHODS[self.config.distill.method].prepare(self.problem)

    def prepare_term(self) -> Iterator[tuple[int, int]]:
        """Train the add-on's networks, if they can be trained before, yielding (steps done, steps in all)."""
        mim = self.config.mim
        return self._trained_on_real.train() if mim.mim_weight and mim.mim_networks == "real" else iter(())

    def distill(
        self,
        on_progress: Callable[[Progress], None],
        *,
        with_mim: bool = True,
        state: Mapping[str, Tensor] | None = None,
    ) -> SyntheticSet:
        """Return the distilled set; `with_mim=False` runs the base method alone.

        Given a `state`, as `mim4dd.distill.distill` has it, the run goes on from there.

        Raises:
            DivergenceError: a term of the loss is not finite any more.
            InputError: a state of other settings, code or device.
        """
        settings = self.config.distill
        method, start = METHODS[settings.method], self.start
        if settings.soft_labels and method.learns_targets:
            start = self.with_soft_labels(start) if state is None else _with_any_labels(start)
        term = self.mutual_information() if with_mim and self.config.mim.mim_weight else None
        distilled = distill(
            self._objective(with_term=term is not None),
            start,
            iterations=settled(settings.iterations),
            lr=settled(settings.image_lr),
            momentum=settings.image_momentum,
            mutual_information=term,
            on_progress=on_progress,
            state=state,
        )
        if settings.soft_labels and not method.learns_targets:
            distilled = self.with_soft_labels(distilled)
        return distilled

    def _objective(self, *, with_term: bool) -> Objective:
        make, seen = METHODS[self.config.distill.method].objective, self.config.mim.mim_networks
        if with_term and seen == "base":
            return make(self.problem)
        alone = make(dataclasses.replace(self.problem, layers=()))
        if not with_term:
            return alone
        networks = self._trained_on_real if seen == "real" else TrainedOnSynthetic(self.problem)
        return ThroughTermNetworks(networks, alone, self.problem)

    @cached_property
    def _trained_on_real(self) -> TrainedOnReal:
        return TrainedOnReal(self.problem)

    def with_soft_labels(self, synthetic: SyntheticSet) -> SyntheticSet:
        """Return the set with soft labels by a network trained on the real images."""
        return dataclasses.replace(synthetic, soft_labels=probabilities(self.teacher, synthetic.decoded))

    @cached_property
    def teacher(self) -> Network:
        """A network trained on the real images."""
        network = self.problem.network()
        random = generator(self.config.seed, "teacher", self.device)
        teach(network, self.train, Protocol.of(self.config), random)
        return network

    def information(self, distilled: SyntheticSet) -> dict[str, float | None]:
        """Return the mutual information with held-out images before and after; see `held_out_information`."""
        return held_out_information(self.problem, self.test, self.start, distilled, self.centres)


def _with_any_labels(start: SyntheticSet) -> SyntheticSet:
    """With soft labels that are replaced by those of a state, so that no teacher is trained for them."""
    shape = len(start.decoded_labels), len(start.class_names)
    labels = torch.full(shape, 1 / shape[1], dtype=torch.float32, device=start.images.device)
    return dataclasses.replace(start, soft_labels=labels)


def _layers(problem: Problem, config: Config) -> list[int]:
    try:
        return layer_indices(config.mim.layers(), len(problem.network().feature_sizes))
    except ValueError as error:
        raise InputError(f"--mim-layers: {str(error).removeprefix('mim4dd: ')}") from error


def resolved(config: Config) -> Config:
    """Return the configuration with a precision in place of "auto".

    Raises:
        InputError: no such device here, or a precision that it lacks.
    """
    device = pick_device(config.device)
    return dataclasses.replace(config, precision=precision.resolve(config.precision, device))
