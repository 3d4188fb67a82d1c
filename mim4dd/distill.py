"""The distillation loop: update the synthetic images so that the terms of the loss fall."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .graph import replayed
from .objectives import MutualInformation, Objective
from .synthetic import SyntheticSet, decode

READ_EVERY = 10  # iterations between looks at the losses, each of which waits for the device
PROJECTION_LR = 1e-3  # Adam's, for the term's own parameters
LABEL_LR = 1e-2  # Adam's, for the logits of soft labels: the same for losses of any scale
LOWEST = -10.0  # log probability of a class that a label starts without


class DivergenceError(RuntimeError):
    """A term of the loss, or the images, became NaN or infinite."""


@dataclass(frozen=True)
class Progress:
    """A look at the run, with everything finite so far.

    Attributes:
        iteration: updates done.
        terms: each term of the loss, averaged over the iterations since the last look.
        synthetic: a copy of the synthetic set as it is now.
    """

    iteration: int
    terms: dict[str, float]
    synthetic: SyntheticSet


def distill(
    objective: Objective,
    start: SyntheticSet,
    *,
    iterations: int,
    lr: float,
    momentum: float,
    mutual_information: MutualInformation | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> SyntheticSet:
    """Return the distilled set; `start` stays as it is.

    Args:
        objective: the base method; what it has `trained` is trained along.
        start: the set to begin with, on the device of the run; soft labels are learned if it has any.
        iterations: number of updates.
        lr: of the images, by SGD.
        momentum: of the images' updates.
        mutual_information: the add-on, if any; what parameters it has are trained along.
        on_progress: called every `READ_EVERY` iterations and after the last.

    Raises:
        DivergenceError: naming the term; `on_progress` has been given the last good set.
    """
    images = start.images.clone().requires_grad_()
    logits = None if start.soft_labels is None else start.soft_labels.log().clamp_min(LOWEST).requires_grad_()
    learned = [images] if logits is None else [images, logits]
    names = ["base", "mim"] if mutual_information else ["base"]
    update = updates(objective, start, images, logits, lr, momentum, mutual_information)
    unread: list[Tensor] = []
    synthetic = start
    for iteration in range(1, iterations + 1):
        unread.append(next(update))
        if iteration % READ_EVERY == 0 or iteration == iterations:
            means = _read(unread, names, iteration, learned)
            synthetic = replace(
                start,
                images=images.detach().clone(),
                soft_labels=None if logits is None else logits.detach().softmax(1),
                network_lr=objective.network_lr,
            )
            on_progress(Progress(iteration, means, synthetic))
            unread.clear()
    return synthetic


def updates(
    objective: Objective,
    start: SyntheticSet,
    images: Tensor,
    logits: Tensor | None,
    lr: float,
    momentum: float,
    mutual_information: MutualInformation | None,
) -> Iterator[Tensor]:
    """Update images, and logits of soft labels, in place, without end; yield the terms [1 or 2] of each time.

    Nothing waits for the device. On a GPU what is the same work every time is replayed.
    """
    # Copies, since SGD writes its defaults into the groups, where those of another run would then stay.
    groups = [{"params": [images], "lr": lr}, *map(dict, objective.trained)]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(groups, momentum=momentum)]
    adam = [{"params": [logits], "lr": LABEL_LR}] if logits is not None else []
    trained = [p for p in mutual_information.parameters() if p.requires_grad] if mutual_information else []
    adam += [{"params": trained, "lr": PROJECTION_LR}] if trained else []
    if adam:
        optimizers.append(torch.optim.Adam(adam, capturable=images.is_cuda))
    leaves = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]

    def decoded() -> tuple[Tensor, Tensor]:
        return decode(images, start.factor), start.targets if logits is None else logits.softmax(1)

    def step() -> Tensor:
        matched = objective.match(*decoded())
        terms = [matched.loss]
        if mutual_information:
            terms.append(
                mutual_information(
                    matched.synthetic_features,
                    matched.real_features,
                    matched.synthetic_labels,
                    matched.real_labels,
                )
            )
        for optimizer in optimizers:
            optimizer.zero_grad()
        values = torch.stack(terms)
        # Named, so that no gradient of a network's weights is worked out for nobody.
        values.sum().backward(inputs=leaves)
        for optimizer in optimizers:
            optimizer.step()
        return values.detach()

    update = step
    if objective.generators is not None:
        update = replayed(step, objective.generators, images.device)
    while True:
        with torch.no_grad():
            objective.prepare(*decoded())
        yield update().clone()


def _remedy(names: list[str]) -> str:
    options = {"base": "--image-lr", "mim": "--mim-weight"}
    return f"lower {' or '.join(options[name] for name in names)}"


def _read(unread: list[Tensor], names: list[str], iteration: int, learned: list[Tensor]) -> dict[str, float]:
    """Fetch the losses of the last iterations, all at once, and average them, if all is finite."""
    values = torch.stack(unread).tolist()
    for when, row in enumerate(values, iteration - len(values) + 1):
        wrong = {name: value for name, value in zip(names, row, strict=True) if not math.isfinite(value)}
        if wrong:  # all of them where it is the images that are not finite
            became = " and ".join(f"the {name} term became {value}" for name, value in wrong.items())
            raise DivergenceError(f"{became} in iteration {when}; {_remedy([*wrong])}")
    if not all(bool(tensor.isfinite().all()) for tensor in learned):
        raise DivergenceError(f"the images are not finite after iteration {iteration}; {_remedy(names)}")
    columns = zip(*values, strict=True)
    return {name: sum(column) / len(values) for name, column in zip(names, columns, strict=True)}
