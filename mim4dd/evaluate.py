"""The evaluation protocol, and `python -m mim4dd.evaluate` that scores a saved set by it.

A network is trained from nothing on the images alone and tested once, after the last epoch, on images that
took no part in anything before.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import augment, networks, stacked
from .augment import AugmentParams
from .data import ImageSet, load
from .devices import pick_device
from .errors import InputError, unknown
from .networks import Network
from .precision import Precision, allow_tf32, resolve
from .seeding import generator
from .stacked import Stack
from .synthetic import SyntheticSet

OnNetwork = Callable[[float], None]


@dataclass(frozen=True)
class Protocol:
    """How a network is trained on a synthetic set (DSA's protocol).

    Attributes:
        epochs: the learning rate falls to a tenth after half of them.
        augmentation: strategy string, one part drawn per step and parameters per image; see `augment.sample`.
        architecture: see `mim4dd.networks.ARCHITECTURES`.
        width: of the ConvNet's blocks.
        lr: of SGD.
        momentum: of SGD.
        weight_decay: of SGD.
        batch: images per step.
        precision: what the networks compute in, see `mim4dd.networks.create`.
    """

    epochs: int
    augmentation: str
    architecture: str = "convnet"
    width: int = 128
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch: int = 256
    precision: str = "fp32"


@dataclass(frozen=True)
class Score:
    """Test accuracies of several networks, each from 0 to 1."""

    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean accuracy."""
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float:
        """Sample standard deviation over the networks; 0 for a single one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.std:.1f} %"


def evaluate(
    training_set: Callable[[int], tuple[Tensor, Tensor]],
    test: ImageSet,
    protocol: Protocol,
    *,
    num_networks: int,
    seed: int,
    on_network: OnNetwork = lambda _: None,
) -> Score:
    """Train `num_networks` networks and test each once.

    Args:
        training_set: for network k, images float32 [n, C, H, W] and their targets: labels int64 [n], or
            probabilities float32 [n, num_classes]. The same n for all of them.
        test: on the device of the run.
        protocol: how to train.
        num_networks: how many.
        seed: of the weights, batches and augmentations; network k is the same for every training set.
        on_network: called with each accuracy.
    """
    device = test.images.device
    network = networks.create(
        protocol.architecture,
        test.channels,
        test.num_classes,
        test.image_size,
        width=protocol.width,
        device=device,
        precision=protocol.precision,
    )
    image = (test.channels, *test.image_size)
    together = stacked.at_once(network, image, protocol.batch, device)
    accuracies = []
    for group in torch.arange(num_networks).split(together):
        random = [generator(seed, f"evaluation/{k}", device) for k in group.tolist()]
        stack = Stack.initialised(network, random)
        _train(stack, [training_set(k) for k in group.tolist()], protocol)
        for trained in stack.unstack():
            accuracies.append(accuracy(trained, test))
            on_network(accuracies[-1])
    return Score(tuple(accuracies))


def train(
    network: Network, images: Tensor, targets: Tensor, protocol: Protocol, generator: torch.Generator
) -> None:
    """Train `network` in place on images [n, C, H, W] and targets [n, ...], every epoch in a new order."""
    _train(Stack.of(network, generator), [(images, targets)], protocol)


def _train(stack: Stack, sets: Sequence[tuple[Tensor, Tensor]], protocol: Protocol) -> None:
    """Train each network of a stack on its own set of images and targets, all of one size."""

    def batch(index: Tensor, params: AugmentParams) -> tuple[Tensor, Tensor]:
        own = [(images[i], targets[i]) for (images, targets), i in zip(sets, index, strict=True)]
        images = augment.apply(torch.cat([x for x, _ in own]), params)
        return images.unflatten(0, index.shape), torch.stack([y for _, y in own])

    stack.network.train()
    optimizer = torch.optim.SGD(
        stack.weights.values(),
        lr=protocol.lr,
        momentum=protocol.momentum,
        weight_decay=protocol.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [protocol.epochs // 2 + 1])
    count, *_, height, width = sets[0][0].shape
    lr = None
    for _ in range(protocol.epochs):
        if schedule.get_last_lr() != lr:  # a new step, for a recorded one keeps its learning rate
            lr = schedule.get_last_lr()
            step = stack.step(optimizer, batch, protocol.augmentation, (height, width))
        for index in stack.epoch(count, protocol.batch):
            step(index)
        schedule.step()


@torch.no_grad()
def accuracy(network: Network, test: ImageSet) -> float:
    """Return the share of `test` that `network` classifies rightly."""
    network.eval()
    device = test.images.device
    right = torch.zeros((), device=device)
    for index in torch.arange(len(test), device=device).split(networks.CHUNK[device.type]):
        right += (network(test.batch(index)).argmax(1) == test.labels[index]).sum()
    return right.item() / len(test)


def score_saved(
    path: Path,
    /,
    *,
    architectures: tuple[str, ...] = (),
    dataset: str | None = None,
    data_dir: Path | None = None,
    num_eval: int = 5,
    eval_epochs: int | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: Precision = "auto",
) -> None:
    """Train networks on a saved synthetic set and print their accuracy on the real test set.

    Args:
        path: a run's folder, or its synthetic.safetensors.
        architectures: of convnet, convnet-bn, mlp, lenet, alexnet, vgg11, resnet18; default: the run's.
        dataset: the real data, where they are not where the run found them: a name or a path.
        data_dir: folder of the files of a named set.
        num_eval: networks trained per architecture.
        eval_epochs: epochs of each; default: the run's.
        seed: of weights, batches and augmentations.
        device: auto, cpu, cuda, cuda:1, ...
        precision: what the networks compute in; auto: the fastest for a ConvNet.
    """
    from .config import from_json, settled
    from .console import on_architectures, print_architectures

    for option, value in (("--num-eval", num_eval), ("--eval-epochs", eval_epochs)):
        if value is not None and value < 1:
            raise InputError(f"{option} is {value}, expected at least 1")
    wanted = tuple(dict.fromkeys(name for name in ",".join(architectures).split(",") if name))
    for name in set(wanted) - set(networks.ARCHITECTURES):
        raise unknown("architecture", name, networks.ARCHITECTURES)
    if path.is_dir():
        path = path / "synthetic.safetensors"
    saved = SyntheticSet.load(path)
    if "config" not in saved.metadata:
        raise InputError(f"{path} holds no settings to evaluate with; expected the set of a mim4dd run")
    config = from_json(saved.metadata["config"], str(path))
    where = pick_device(device)
    picked = resolve(precision, where)
    allow_tf32(picked)
    source = dataset or config.data.dataset
    _, test = load(source, data_dir or config.data.data_dir, config.data.image_size)
    if test.class_names != saved.class_names or test.images.shape[1:] != saved.images.shape[1:]:
        raise InputError(
            f"{path} holds {len(saved.class_names)} classes of images {list(saved.images.shape[1:])}, but "
            f"{source} {test.num_classes} of {list(test.images.shape[1:])}; name its data with --dataset"
        )
    # The networks are trained in the saved set's normalisation, so they are tested in it too.
    test = test.whitened(saved.whitening) if saved.whitening else test
    test = dataclasses.replace(test, mean=saved.mean, std=saved.std).to(where)
    pair = saved.to(where).decoded, saved.to(where).targets

    def score(architecture: str, on_network: OnNetwork) -> Score:
        protocol = Protocol(
            epochs=eval_epochs or settled(config.eval.eval_epochs),
            augmentation=settled(config.distill.augmentation),
            architecture=architecture,
            width=settled(config.distill.width),
            lr=saved.network_lr or Protocol.lr,
            precision=picked,
        )
        return evaluate(
            lambda _: pair,
            test,
            protocol,
            num_networks=num_eval,
            seed=seed,
            on_network=on_network,
        )

    scores = on_architectures(wanted or (config.distill.network,), num_eval, score)
    print_architectures(f"Accuracy on the test set of {len(test)} images", scores)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    import tyro

    from .console import guarded

    return guarded(lambda: tyro.cli(score_saved, prog="python -m mim4dd.evaluate", args=arguments))


if __name__ == "__main__":
    sys.exit(main())
