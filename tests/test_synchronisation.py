"""No step waits for the device: all of them run on tensors without values, where a look at one fails.

The device "meta" takes the branches of a GPU (whatever is not "cpu"), works out shapes, and raises where a
value is asked for. Meant to look, and left out here by name: the loss every few iterations (`distill._read`,
`network_lr`), the accuracy of a network that is trained, a snapshot of experts that is written to a file.
"""

import contextlib
import dataclasses
import itertools

import pytest
import torch
from conftest import digits_problem
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mim4dd import NCELoss, distill, evaluation, networks, seeding, stacked
from mim4dd.objectives import (
    METHODS,
    MutualInformation,
    TrainedOnReal,
    TrainedOnSynthetic,
    TrajectoryMatching,
    experts,
    term_networks,
    trajectory,
)
from mim4dd.stacked import Stack

META = torch.device("meta")
DSA = "color_crop_cutout_flip_scale_rotate"


class Generator(torch.Generator):
    """Says that it is on the device without values, where nothing is drawn."""

    device = META


def seeded(seed, purpose, device="cpu"):
    return (Generator if torch.device(device) == META else torch.Generator)()


class Copies(TorchDispatchMode):
    """Refuses copies between host and device, which a CUDA graph cannot hold either way."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        # A single number of the host's is an argument of a kernel, unless it is itself what is copied.
        copied = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        if len({x.device for x in tensors if x.ndim or copied}) > 1:
            raise RuntimeError(f"{func} copies between {' and '.join(str(x.device) for x in tensors)}")
        return result


@contextlib.contextmanager
def no_copies():
    def refuse(*_, **__):
        raise RuntimeError("torch.tensor copies between host and device")

    with pytest.MonkeyPatch.context() as patch, Copies():
        patch.setattr(torch, "tensor", refuse)  # on "meta" it copies nothing, so that no mode sees it
        yield


def guarded(step, generators, device):
    """What is replayed on a GPU: once warm, it copies nothing between host and device."""
    calls = itertools.count()

    def run(*inputs):
        with no_copies() if next(calls) else contextlib.nullcontext():
            return step(*inputs)

    return run


@pytest.fixture(autouse=True)
def device_without_values(monkeypatch):
    for sizes in (networks.CHUNK, stacked.LARGEST_STACK):
        monkeypatch.setitem(sizes, "meta", sizes["cuda"])
    for module in (seeding, term_networks, trajectory, experts):
        monkeypatch.setattr(module, "generator", seeded)
    for module in (distill, stacked):
        monkeypatch.setattr(module, "replayed", guarded)
    for name, value in {
        "REAL_NETWORKS": 2,
        "REAL_STEPS": 8,
        "STUDENT_EVERY": 2,
        "STUDENT_EPOCHS": (4, 6),
    }.items():
        monkeypatch.setattr(term_networks, name, value)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # has no "meta"
    monkeypatch.setattr(distill, "_read", lambda *_: {})
    monkeypatch.setattr(TrajectoryMatching, "network_lr", None)


def valueless(real):
    moved = real.to(META)
    moved.__dict__["class_index"] = tuple(x.to(META) for x in real.class_index)  # worked out once, before
    return moved


# The add-on's own networks know nothing of the method.
CASES = [
    *((method, "convnet", None) for method in METHODS),
    *((method, "convnet-bn", None) for method in METHODS if method != "mtt"),
    *(("dm", net, seen) for net in ("convnet", "convnet-bn") for seen in (TrainedOnReal, TrainedOnSynthetic)),
]


@pytest.mark.parametrize(("method", "network", "seen"), CASES)
def test_an_iteration_waits_for_nothing(method, network, seen, tmp_path, monkeypatch):
    problem, start = digits_problem(ipc=2, factor=2)
    problem = dataclasses.replace(
        problem,
        architecture=network,
        augmentation=DSA if METHODS[method].augmented else "none",
        layers=(0, 1),
        trajectory=dataclasses.replace(problem.trajectory, experts=tmp_path),
    )
    if method == "mtt":  # the experts are there, in a file
        with monkeypatch.context() as here:
            here.setattr(stacked, "replayed", lambda step, *_: step)
            found = TrajectoryMatching(problem).experts
        monkeypatch.setattr(trajectory, "train_experts", lambda _: ())
        monkeypatch.setattr(trajectory, "open_experts", lambda *_: found)
    soft = METHODS[method].learns_targets
    start = dataclasses.replace(start.to(META), soft_labels=torch.rand(80, 10, device=META) if soft else None)
    problem = dataclasses.replace(problem, real=valueless(problem.real), labels=problem.labels.to(META))
    objective = METHODS[method].objective(problem)
    objective.outer, objective.inner = 3, 2
    calls = []
    match = objective.match
    objective.match = lambda *given: calls.append(given) or match(*given)
    if seen:
        objective = term_networks.ThroughTermNetworks(seen(problem), objective, problem)
    distill.distill(
        objective,
        start,
        iterations=4,
        lr=1.0,
        momentum=0.5,
        mutual_information=MutualInformation(weight=1.0, layers="all", loss="info_nce" if seen else "nce"),
    )
    assert len(calls) == 4


@pytest.mark.parametrize(("architecture", "count"), [("convnet", 1), ("convnet", 2), ("convnet-bn", 1)])
def test_a_training_step_waits_for_nothing(architecture, count):
    network = networks.create(architecture, 1, 10, (8, 8), width=8, device=META)
    stack = Stack.initialised(network, [Generator() for _ in range(count)])
    pair = torch.rand(50, 1, 8, 8, device=META), torch.zeros(50, dtype=torch.int64, device=META)
    evaluation.train(stack, [pair] * count, evaluation.Protocol(4, DSA, batch=16))


def test_training_experts_waits_for_nothing():
    problem, _ = digits_problem()
    problem = dataclasses.replace(problem, real=valueless(problem.real))
    path = experts._paths(trajectory.recipe(problem), range(2))
    assert len([*path]) == 4


@pytest.mark.parametrize("kind", [NCELoss, MutualInformation])
def test_calibration_waits_for_nothing(kind):
    rows, labels = torch.rand(6, 4, device=META), torch.zeros(6, dtype=torch.int64, device=META)
    first, second = (kind(noise_ratio="calibrated").to(META) for _ in range(2))
    first(rows, rows, labels, labels)
    with no_copies():
        first(rows, rows, labels, labels)
    second.load_state_dict(first.state_dict())
    with no_copies():
        second(rows, rows, labels, labels)


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x.unique(),
        lambda x: torch.nn.functional.one_hot(x.long()),
    ],
)
def test_a_look_would_be_noticed(look):
    with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        look(torch.zeros(3, device=META))


@pytest.mark.parametrize(
    "copy",
    [
        lambda x, one: torch.tensor([1.0, 2.0, 3.0], device=META) + x,
        lambda x, one: one.to(META) + x,
        lambda x, one: x.copy_(torch.ones(3)),
        lambda x, one: x.copy_(one),
    ],
)
def test_a_copy_would_be_noticed(copy):
    one = torch.ones(())
    with no_copies(), pytest.raises(RuntimeError, match="copies between"):
        copy(torch.zeros(3, device=META), one)


def test_numbers_are_no_copies():
    one = torch.ones(())
    with no_copies():
        x = torch.zeros(3, device=META)
        x + 1.0 + one
        x.fill_(3.0)
