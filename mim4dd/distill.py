"""The distillation loop: update the synthetic images so that the terms of the loss fall."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import InputError
from .graph import replayed
from .objectives import MutualInformation, Objective
from .state import State, counter, prefixed, restore, snapshot
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
        state: what `distill` needs to go on from here; None if the objective's own state is not known.
    """

    iteration: int
    terms: dict[str, float]
    synthetic: SyntheticSet
    state: dict[str, Tensor] | None


def distill(
    objective: Objective,
    start: SyntheticSet,
    *,
    iterations: int,
    lr: float,
    momentum: float,
    mutual_information: MutualInformation | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    state: Mapping[str, Tensor] | None = None,
) -> SyntheticSet:
    """Return the distilled set; `start` stays as it is.

    Args:
        objective: the base method; its `trained` parameters are trained along.
        start: the set to begin with, on the device of the run; soft labels are learned if it has any.
        iterations: number of updates.
        lr: of the images, by SGD.
        momentum: of the images' updates.
        mutual_information: the add-on, if any; its parameters are trained along.
        on_progress: called every `READ_EVERY` iterations and after the last.
        state: where an earlier call with the same arguments was, `Progress.state`: the updates left are those
            that it would have done.

    Raises:
        DivergenceError: naming the term; `on_progress` has been given the last good set.
        InputError, RuntimeError: a state of another objective, add-on or device, as far as names and shapes
            tell.
    """
    remedies = {"base": objective.remedy} | ({"mim": "--mim-weight"} if mutual_information else {})
    distillation = Distillation(objective, start, lr, momentum, mutual_information)
    if state is not None:
        distillation.restore(state)
    unread: list[Tensor] = []
    for iteration in range(int(distillation.done) + 1, iterations + 1):
        unread.append(distillation.update())
        if iteration % READ_EVERY == 0 or iteration == iterations:
            means = _read(unread, remedies, iteration, distillation.learned)
            on_progress(Progress(iteration, means, distillation.synthetic, distillation.snapshot()))
            unread.clear()
    return distillation.synthetic if iterations else start


class Distillation:
    """A synthetic set in the making: updates of its images, and logits of soft labels, in place.

    Nothing in an update waits for the device. On a GPU, work that is the same every time is replayed.

    Args:
        objective: see `distill`, as for the others.
        start: the set to begin with.
        lr: of the images.
        momentum: of their updates.
        mutual_information: the add-on, if any.
    """

    def __init__(
        self,
        objective: Objective,
        start: SyntheticSet,
        lr: float,
        momentum: float,
        mutual_information: MutualInformation | None = None,
    ) -> None:
        self.objective, self.start, self.term = objective, start, mutual_information
        self.done = counter()
        self.images = start.images.clone().requires_grad_()
        self.logits = None
        if start.soft_labels is not None:
            self.logits = start.soft_labels.log().clamp_min(LOWEST).requires_grad_()
        # Copies, since SGD writes its defaults into the groups, where those of another run would then stay.
        groups = [{"params": [self.images], "lr": lr}, *map(dict, objective.trained)]
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(groups, momentum=momentum)]
        adam = [{"params": [self.logits], "lr": LABEL_LR}] if self.logits is not None else []
        trained = [p for p in self.term.parameters() if p.requires_grad] if self.term else []
        adam += [{"params": trained, "lr": PROJECTION_LR}] if trained else []
        if adam:
            self.optimizers.append(torch.optim.Adam(adam, capturable=self.images.is_cuda))
        self._leaves = [p for o in self.optimizers for group in o.param_groups for p in group["params"]]
        self._step = self._plain_step
        if objective.generators is not None:
            self._step = replayed(self._plain_step, objective.generators, self.images.device)

    def update(self) -> Tensor:
        """Do an update and return the terms of its loss [1 or 2]."""
        with torch.no_grad():
            self.objective.prepare(*self._decoded())
        terms = self._step().clone()
        self.done += 1
        return terms

    @property
    def learned(self) -> list[Tensor]:
        """What is to be distilled: the images, and the logits of soft labels."""
        return [self.images] if self.logits is None else [self.images, self.logits]

    @property
    def synthetic(self) -> SyntheticSet:
        """A copy of the set as it is now."""
        return replace(
            self.start,
            images=self.images.detach().clone(),
            soft_labels=None if self.logits is None else self.logits.detach().softmax(1),
            network_lr=self.objective.network_lr,
        )

    def snapshot(self) -> dict[str, Tensor] | None:
        """Return a copy of all that later updates depend on; None if the objective's state is not known."""
        state = self._state()
        if state is None:
            return None
        saved = snapshot(state)
        for name, optimizer in self._named_optimizers():
            for index, kept in optimizer.state_dict()["state"].items():
                saved |= snapshot(prefixed(f"{name}.{index}", kept))
        return saved | (snapshot(prefixed("term", self.term.state_dict())) if self.term else {})

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from what `snapshot` returned.

        Raises:
            InputError: it did so for another objective or device.
            RuntimeError: or for another add-on.
        """
        state = self._state()
        if state is None:
            raise InputError("this objective cannot be resumed: its state() is None")
        if self.term:
            self.term.load_state_dict(_under("term", saved))
            self.term.to(self.images.device)
        for name, optimizer in self._named_optimizers():
            kept: dict[int, dict[str, Tensor]] = {}
            for own, value in _under(name, saved).items():
                index, _, key = own.partition(".")
                kept.setdefault(int(index), {})[key] = value.clone()
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": kept, "param_groups": groups})
        others = ("term.", *(f"{name}." for name, _ in self._named_optimizers()))
        restore(state, {n: value for n, value in saved.items() if not n.startswith(others)})

    def _state(self) -> State | None:
        objective = self.objective.state()
        if objective is None:
            return None
        leaves: State = {str(k): leaf for k, leaf in enumerate(self._leaves)}
        return {"done": self.done} | prefixed("leaf", leaves) | prefixed("objective", objective)

    def _named_optimizers(self) -> list[tuple[str, torch.optim.Optimizer]]:
        return [(f"optimizer {k}", optimizer) for k, optimizer in enumerate(self.optimizers)]

    def _decoded(self) -> tuple[Tensor, Tensor]:
        targets = self.start.targets if self.logits is None else self.logits.softmax(1)
        return decode(self.images, self.start.factor), targets

    def _plain_step(self) -> Tensor:
        matched = self.objective.match(*self._decoded())
        terms = [matched.loss]
        if self.term:
            terms.append(
                self.term(
                    matched.synthetic_features,
                    matched.real_features,
                    matched.synthetic_labels,
                    matched.real_labels,
                )
            )
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        values = torch.stack(terms)
        # Named, so that no gradient of a network's weights is worked out for nobody.
        values.sum().backward(inputs=self._leaves)
        for optimizer in self.optimizers:
            optimizer.step()
        return values.detach()


def _under(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {own.removeprefix(f"{name}."): value for own, value in state.items() if own.startswith(f"{name}.")}


def _read(
    unread: list[Tensor], remedies: Mapping[str, str], iteration: int, learned: list[Tensor]
) -> dict[str, float]:
    """Fetch the losses of the last iterations, all at once, and average them, if all is finite.

    `remedies` names their terms, and for each the options to lower if it is not.
    """
    names = [*remedies]
    values = torch.stack(unread).tolist()
    for when, row in enumerate(values, iteration - len(values) + 1):
        wrong = {name: value for name, value in zip(names, row, strict=True) if not math.isfinite(value)}
        if wrong:  # all of them where it is the images that are not finite
            became = " and ".join(f"the {name} term became {value}" for name, value in wrong.items())
            raise DivergenceError(f"{became} in iteration {when}; {_lower(remedies, wrong)}")
    if not all(bool(tensor.isfinite().all()) for tensor in learned):
        raise DivergenceError(
            f"the images are not finite after iteration {iteration}; {_lower(remedies, names)}"
        )
    columns = zip(*values, strict=True)
    return {name: sum(column) / len(values) for name, column in zip(names, columns, strict=True)}


def _lower(remedies: Mapping[str, str], names: Iterable[str]) -> str:
    return f"lower {' or '.join(remedies[name] for name in names)}"
