"""What an experiment's images are worth: the accuracy of networks trained on them, and that of baselines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from ..config import settled
from ..evaluation import OnNetwork, Protocol, Score, accuracy, evaluate, train_on_real
from ..experiment import Experiment
from ..seeding import generator
from ..synthetic import SyntheticSet, initialise

FULL_SHARE = 20  # full data: the epochs divided by this, but at least 5; and one network


def score(
    experiment: Experiment, synthetic: SyntheticSet, on_network: OnNetwork, architecture: str | None = None
) -> Score:
    """Evaluate a synthetic set on the run's architecture or another.

    With the learning rate that belongs to the set, if there is one.
    """
    pair = synthetic.decoded, synthetic.targets
    protocol = Protocol.of(experiment.config, architecture, synthetic.network_lr)
    return _evaluate(experiment, lambda _: pair, protocol, on_network)


def baseline(experiment: Experiment, name: str, on_network: OnNetwork) -> Score:
    """Evaluate real images: "random" (new ones for every network), "kmeans" or "full"."""
    config = experiment.config
    if name == "full":
        return _full(experiment, on_network)

    def start(how: str, purpose: str) -> SyntheticSet:
        random = generator(config.seed, f"baseline/{purpose}", experiment.device)
        return initialise(experiment.train, config.distill.ipc, how, random)

    if name == "kmeans":
        return score(experiment, start("kmeans", "kmeans"), on_network)

    def draw(k: int) -> tuple[Tensor, Tensor]:
        drawn = start("real", f"random/{k}")
        return drawn.images, drawn.labels

    return _evaluate(experiment, draw, Protocol.of(config), on_network)


def _full(experiment: Experiment, on_network: OnNetwork) -> Score:
    network, protocol = experiment.problem.network(), Protocol.of(experiment.config)
    protocol = dataclasses.replace(protocol, epochs=max(5, protocol.epochs // FULL_SHARE))
    random = generator(experiment.config.seed, "evaluation/0", experiment.device)
    train_on_real(network, experiment.train, protocol, random)
    reached = accuracy(network, experiment.test)
    on_network(reached)
    return Score((reached,))


def _evaluate(
    experiment: Experiment,
    training_set: Callable[[int], tuple[Tensor, Tensor]],
    protocol: Protocol,
    on_network: OnNetwork,
) -> Score:
    return evaluate(
        training_set,
        experiment.test,
        protocol,
        num_networks=settled(experiment.config.eval.num_eval),
        seed=experiment.config.seed,
        on_network=on_network,
    )
