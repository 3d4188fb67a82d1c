"""What an experiment's images are worth: the accuracy of networks trained on them, and that of baselines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from .config import settled
from .evaluation import OnNetwork, Protocol, Score, accuracy, evaluate, train_on_real
from .experiment import Experiment
from .seeding import generator
from .synthetic import SyntheticSet, select_kmeans

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
    config, real, labels = experiment.config, experiment.train, experiment.start.labels
    protocol, ipc = Protocol.of(config), config.distill.ipc
    if name == "full":
        return _full(experiment, protocol, on_network)
    if name == "kmeans":
        random = generator(config.seed, "baseline/kmeans", experiment.device)
        pair = real.batch(select_kmeans(real, ipc, random).flatten()), labels
        return _evaluate(experiment, lambda _: pair, protocol, on_network)

    def draw(k: int) -> tuple[Tensor, Tensor]:
        random = generator(config.seed, f"baseline/random/{k}", experiment.device)
        return real.batch(real.sample(ipc, random).flatten()), labels

    return _evaluate(experiment, draw, protocol, on_network)


def _full(experiment: Experiment, protocol: Protocol, on_network: OnNetwork) -> Score:
    network = experiment.problem.network()
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
