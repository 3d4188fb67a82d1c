"""The loop, step against step: each of its parts beside the textbook version (baselines.py), in one run.

    python -m pytest bench/test_loop.py --benchmark-enable --benchmark-json=loop.json
    python -m bench.report loop.json

IPC 10, 256 real images a class, images of Fashion-MNIST's shape with random pixels, width 128, 10 classes. A
group is one step: `textbook`, then ours in float32 and, where the hardware has it, in bfloat16; and in
float32 the other way to do it: networks of the evaluation `stacked` or `alone`, and on a GPU `launched`, that
is without CUDA graphs. First, in float32 and without augmentation, both must give the same loss and the same
gradient from the same weights. On a GPU a step is timed with a synchronisation.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from bench import baselines
from mim4dd import augment, convolution, evaluate, graph, networks, precision, stacked
from mim4dd.data import ImageSet
from mim4dd.distill import updates
from mim4dd.objectives import METHODS, GradientMatching, Problem, distribution, gradient, trajectory_distance
from mim4dd.seeding import generator
from mim4dd.synthetic import SyntheticSet

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
CLASSES, IPC, REAL_BATCH, WIDTH, SIDE = 10, 10, 256, 128, 28
STRATEGY = "color_crop_cutout_scale_rotate"
NETWORKS, TEST = 5, 1000
EPOCHS = {"cpu": 4, "cuda": 40}  # a graph is there only after some steps
STEPS, STEP_SIZE = 20, 0.01
ROUNDS = {"cpu": 2, "cuda": 20}


def versions(device: str) -> list[str]:
    names = ["textbook", "fp32"]
    best = precision.resolve("auto", torch.device(device))
    return names if best == "fp32" else [*names, best]


def other_ways(device: str) -> list[tuple[str, str]]:
    """Steps, and how they are not done without being told to."""
    if device == "cpu":
        return [("evaluation", "fp32 stacked")]
    return [("evaluation", "fp32 alone"), *((step, "fp32 launched") for step in OURS)]


def real_set(per_class: int, device: str) -> ImageSet:
    pixels = torch.randint(
        256, (CLASSES * per_class, 1, SIDE, SIDE), dtype=torch.uint8, generator=generator(0, "bench/real")
    )
    labels = torch.arange(CLASSES).repeat_interleave(per_class)
    names = tuple(map(str, range(CLASSES)))
    return ImageSet(pixels, labels, names, torch.tensor([0.5]), torch.tensor([0.25])).to(device)


def problem(real: ImageSet, strategy: str, name: str) -> Problem:
    return Problem(
        real=real,
        labels=torch.arange(CLASSES, device=real.images.device).repeat_interleave(IPC),
        architecture="convnet",
        width=WIDTH,
        real_batch=REAL_BATCH,
        augmentation=strategy,
        layers=(),
        seed=0,
        precision="fp32" if name == "textbook" else name.split()[0],
    )


def synthetic(device: str) -> Tensor:
    shape = (CLASSES * IPC, 1, SIDE, SIDE)
    return torch.randn(shape, generator=generator(0, "bench/synthetic"), device="cpu").to(device)


def setting(of: Problem, images: Tensor, weights=None) -> baselines.Setting:
    """The same problem for the textbook loops."""
    real = of.real
    parts = [] if of.augmentation == "none" else of.augmentation.split("_")
    return baselines.Setting(
        real=real.batch(torch.arange(len(real), device=real.images.device)),
        classes=[(real.labels == c).nonzero().flatten() for c in range(CLASSES)],
        images=images.clone().requires_grad_(),
        labels=of.labels,
        real_batch=of.real_batch,
        width=of.width,
        parts=parts,
        weights=weights,
    )


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Within the tolerance of the largest number: sums differ in their order."""
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"relative error {error:.1e}"


# ------------------------------------------------------------------------- the steps, ours and the textbook's


def matching_step(method: str, of: Problem, images: Tensor) -> Callable[[], object]:
    """An iteration of the distillation loop on a network that is not trained in between."""
    objective = METHODS[method].objective(of)
    if isinstance(objective, GradientMatching):
        objective.inner = 0
    real = of.real
    start = SyntheticSet(images, of.labels, real.class_names, real.mean, real.std)
    learned = images.clone().requires_grad_()
    update = updates(objective, start, learned, None, METHODS[method].image_lr, 0.5, None)
    return lambda: next(update)


def textbook_step(method: str, of: Problem, images: Tensor) -> Callable[[], object]:
    plain = setting(of, images)
    optimizer = torch.optim.SGD([plain.images], lr=METHODS[method].image_lr, momentum=0.5)
    if method == "dm":
        return lambda: baselines.distribution_step(plain, optimizer)
    network = plain.network()
    return lambda: baselines.gradient_step(plain, network, optimizer)


def inner_step(of: Problem, images: Tensor) -> Callable[[], object]:
    """An epoch of the network on the 100 synthetic images, as between two image steps."""
    objective = GradientMatching(of)
    networks.initialise(objective.network, objective.weights)
    objective.inner = 1
    return lambda: objective._train(images, of.labels)


def textbook_inner_step(of: Problem, images: Tensor) -> Callable[[], object]:
    plain = setting(of, images)
    network = plain.network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    return lambda: baselines.train_epoch(plain, network, optimizer)


def evaluation(of: Problem, images: Tensor) -> Callable[[], object]:
    protocol = evaluate.Protocol(
        EPOCHS[images.device.type], of.augmentation, width=WIDTH, precision=of.precision
    )
    test = of.real._subset(torch.arange(TEST, device=images.device))
    training_set = (images, of.labels)
    return lambda: evaluate.evaluate(lambda _: training_set, test, protocol, num_networks=NETWORKS, seed=0)


def textbook_evaluation(of: Problem, images: Tensor) -> Callable[[], object]:
    plain = setting(of, images)
    test = (plain.real[:TEST], of.real.labels[:TEST])
    return lambda: baselines.evaluate(plain, test, NETWORKS, EPOCHS[images.device.type])


def trajectory(of: Problem) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two points of a made-up trajectory."""
    network = of.network()
    networks.initialise(network, generator(0, "bench/start", of.real.images.device))
    start = {name: value.detach().clone() for name, value in network.named_parameters()}
    return start, {name: value + 0.01 * torch.randn_like(value) for name, value in start.items()}


def trajectory_step(of: Problem, images: Tensor) -> Callable[[], object]:
    network, (start, target) = of.network(), trajectory(of)
    images = images.clone().requires_grad_()
    random = generator(0, "bench/augmentation", images.device)

    def step() -> Tensor:
        params = augment.sample(of.augmentation, len(images), SIDE, generator=random)
        x = augment.apply(images, params)
        loss = trajectory_distance(network, start, target, x, of.labels, steps=STEPS, step_size=STEP_SIZE)
        return torch.autograd.grad(loss, images)[0]

    return graph.replayed(step, [random], images.device)


def textbook_trajectory_step(of: Problem, images: Tensor) -> Callable[[], object]:
    plain = setting(of, images)
    start, target = ([*weights.values()] for weights in trajectory(of))

    def step() -> Tensor:
        loss = baselines.trajectory_step(plain, start, target, STEPS, STEP_SIZE)
        return torch.autograd.grad(loss, plain.images)[0]

    return step


OURS: Mapping[str, Callable[[Problem, Tensor], Callable[[], object]]] = {
    "dm": functools.partial(matching_step, "dm"),
    "dc": functools.partial(matching_step, "dc"),
    "dsa": functools.partial(matching_step, "dsa"),
    "inner": inner_step,
    "evaluation": evaluation,
    "mtt": trajectory_step,
}
TEXTBOOK: Mapping[str, Callable[[Problem, Tensor], Callable[[], object]]] = {
    "dm": functools.partial(textbook_step, "dm"),
    "dc": functools.partial(textbook_step, "dc"),
    "dsa": functools.partial(textbook_step, "dsa"),
    "inner": textbook_inner_step,
    "evaluation": textbook_evaluation,
    "mtt": textbook_trajectory_step,
}


# ------------------------------------------------------------------------------------------------ the tests


@pytest.fixture
def small():
    """As many real images in a class as are drawn, so that both sides use them all."""

    def make(device: str) -> tuple[Problem, Tensor]:
        return problem(real_set(16, device), "none", "fp32"), synthetic(device)

    def shrunk(device: str) -> tuple[Problem, Tensor]:
        of, images = make(device)
        return dataclasses.replace(of, real_batch=16, width=32), images

    return shrunk


@pytest.fixture(autouse=True)
def float32_convolutions():
    precision.allow_tf32("fp32")


@pytest.fixture(params=["torch's convolutions", "open ReLUs"])
def comparable(request, monkeypatch):
    """Makes small errors stay small: other roundings may open a ReLU that is shut on the other side.

    So either both sides have the same convolutions, or ours has its own and every ReLU is open.
    """

    def opened(network, random):
        initialise(network, random)
        for module in network.modules():
            if isinstance(module, torch.nn.GroupNorm):
                torch.nn.init.constant_(module.bias, 6.0)

    initialise = networks.initialise
    if request.param == "open ReLUs":
        for module in (networks, distribution, gradient):
            monkeypatch.setattr(module, "initialise", opened)
    else:
        monkeypatch.setattr(convolution, "_is_compiled", lambda *_: False)
        monkeypatch.setattr(networks, "is_compiled", lambda *_: False)


@pytest.mark.usefixtures("comparable")
@pytest.mark.parametrize("method", ["dm", "dc"])
@pytest.mark.parametrize("device", DEVICES)
def test_matching_is_that_of_the_textbook(device, method, small):
    of, images = small(device)
    objective = METHODS[method].objective(of)
    ours = images.clone().requires_grad_()
    loss = objective(ours, of.labels).loss
    loss.backward(inputs=[ours])
    plain = setting(of, images, [*objective.network.parameters()])
    optimizer = torch.optim.SGD([plain.images], lr=0.0)
    if method == "dm":
        expected = baselines.distribution_step(plain, optimizer)
    else:
        expected = baselines.gradient_step(plain, plain.network(), optimizer)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    close(ours.grad, plain.images.grad)


@pytest.mark.usefixtures("comparable")
@pytest.mark.parametrize("device", DEVICES)
def test_the_trained_network_is_that_of_the_textbook(device, small):
    """The protocol of the evaluation, three epochs; the inner step is one of them without momentum."""
    of, images = small(device)
    network = of.network().requires_grad_()
    networks.initialise(network, generator(0, "bench/start", torch.device(device)))
    plain = setting(of, images, [p.detach().clone() for p in network.parameters()])
    protocol = evaluate.Protocol(3, "none", width=of.width)
    evaluate.train(network, images, of.labels, protocol, generator(0, "bench/train", torch.device(device)))
    theirs = plain.network()
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2])
    for _ in range(3):
        baselines.train_epoch(plain, theirs, optimizer)
        schedule.step()
    for ours, expected in zip(network.parameters(), theirs.parameters(), strict=True):
        close(ours, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_trajectory_matching_is_that_of_the_textbook(device, small):
    """In float64: in float32 a ReLU that opens on one side only moves either gradient by up to a percent."""
    of, images = small(device)
    start, target = ({name: w.double() for name, w in weights.items()} for weights in trajectory(of))
    ours = images.double().requires_grad_()
    loss = trajectory_distance(
        of.network().double(), start, target, ours, of.labels, steps=3, step_size=STEP_SIZE
    )
    loss.backward()
    plain = setting(of, images.double())
    expected = baselines.trajectory_step(plain, [*start.values()], [*target.values()], 3, STEP_SIZE)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    close(ours.grad, plain.images.grad, 1e-9)


CASES = [
    *((device, step, name) for device in DEVICES for step in OURS for name in versions(device)),
    *((device, *way) for device in DEVICES for way in other_ways(device)),
]


@pytest.mark.parametrize(("device", "step", "name"), CASES)
def test_loop(benchmark, device, step, name, monkeypatch):
    if benchmark.disabled:
        pytest.skip("only the equality is tested where nothing is timed")
    benchmark.group = f"{device} {step}"
    if name.endswith("launched"):
        monkeypatch.setattr(graph, "WARM_UP", math.inf)
    elif name.endswith(("stacked", "alone")):
        monkeypatch.setitem(stacked.AT_ONCE, device, NETWORKS if name.endswith("stacked") else 1)
    of = problem(real_set(6000, device), "none" if step == "dc" else STRATEGY, name)
    call = (TEXTBOOK if name == "textbook" else OURS)[step](of, synthetic(device))
    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None

    def timed() -> None:
        call()
        synchronise()

    rounds = min(ROUNDS[device], 3) if step == "evaluation" else ROUNDS[device]
    benchmark.pedantic(timed, rounds=rounds, warmup_rounds=1)
    benchmark.extra_info |= {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
