"""The distillation loop: update the synthetic images so that the terms of the loss fall."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .objectives import MutualInformation, Objective

READ_EVERY = 10  # iterations between looks at the losses, each of which waits for the device
PROJECTION_LR = 1e-3  # Adam's, for the term's own parameters


class DivergenceError(RuntimeError):
    """A term of the loss, or the images, became NaN or infinite."""


@dataclass(frozen=True)
class Progress:
    """A look at the run, with everything finite so far.

    Attributes:
        iteration: updates done.
        terms: each term of the loss, averaged over the iterations since the last look.
        images: a copy of the synthetic images [n, C, H, W].
    """

    iteration: int
    terms: dict[str, float]
    images: Tensor


def distill(
    objective: Objective,
    images: Tensor,
    *,
    iterations: int,
    lr: float,
    momentum: float,
    mutual_information: MutualInformation | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Tensor:
    """Return distilled images; `images` [n, C, H, W], where they start, stays as it is.

    Args:
        objective: the base method.
        images: float32 [n, C, H, W], normalised, class by class as the objective's labels.
        iterations: number of updates.
        lr: of the images, by SGD.
        momentum: of the images' updates.
        mutual_information: the add-on, if any; what parameters it has are trained along.
        on_progress: called every `READ_EVERY` iterations and after the last.

    Raises:
        DivergenceError: naming the term; `on_progress` has been given the last good images.
    """
    images = images.clone().requires_grad_()
    optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD([images], lr=lr, momentum=momentum)]
    trained = [p for p in mutual_information.parameters() if p.requires_grad] if mutual_information else []
    if trained:
        optimizers.append(torch.optim.Adam(trained, lr=PROJECTION_LR))
    unread: list[dict[str, Tensor]] = []
    for iteration in range(1, iterations + 1):
        matched = objective(images)
        terms = {"base": matched.loss}
        if mutual_information:
            terms["mim"] = mutual_information(
                matched.synthetic_features,
                matched.real_features,
                matched.synthetic_labels,
                matched.real_labels,
            )
        for optimizer in optimizers:
            optimizer.zero_grad()
        # Named, so that no gradient of a network's weights is worked out for nobody.
        torch.stack([*terms.values()]).sum().backward(inputs=[images, *trained])
        for optimizer in optimizers:
            optimizer.step()
        unread.append({name: term.detach() for name, term in terms.items()})
        if iteration % READ_EVERY == 0 or iteration == iterations:
            means = _read(unread, iteration, images)
            on_progress(Progress(iteration, means, images.detach().clone()))
            unread.clear()
    return images.detach()


def _read(unread: list[dict[str, Tensor]], iteration: int, images: Tensor) -> dict[str, float]:
    """Fetch the losses of the last iterations, all at once, and average them, if all is finite."""
    names = list(unread[0])
    values = torch.stack([torch.stack([*terms.values()]) for terms in unread]).tolist()
    for back, row in enumerate(values):
        for name, value in zip(names, row, strict=True):
            if not math.isfinite(value):
                raise DivergenceError(
                    f"the {name} term became {value} in iteration {iteration - len(values) + 1 + back}; "
                    f"lower {'--mim-weight' if name == 'mim' else '--image-lr'}"
                )
    if not bool(images.isfinite().all()):
        raise DivergenceError(f"the images are not finite after iteration {iteration}; lower --image-lr")
    columns = zip(*values, strict=True)
    return {name: sum(column) / len(values) for name, column in zip(names, columns, strict=True)}
