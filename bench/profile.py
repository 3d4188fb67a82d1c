"""Where the time of an iteration goes.

    python -m bench.profile --method dm [--ipc 10] [--trace FILE]

Prints the seconds of an iteration's parts, measured by torch's profiler over random images of MNIST's
shape, and what fraction of the matrix rate, measured in the same run, the networks' operations reach.
`--trace` writes a Chrome trace. On a GPU, where iterations are replayed as a whole, the parts are those of
iterations that are launched one operator at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from bench import problems
from bench.measure import matrix_rate, seconds
from mim4dd import augment, extension, graph
from mim4dd.devices import pick_device
from mim4dd.distill import Distillation
from mim4dd.errors import InputError
from mim4dd.networks import precision
from mim4dd.objectives import METHODS, Problem, characteristic, distribution, gradient, student, trajectory

PARTS = ("forward real", "forward synthetic", "gradients real", "gradients synthetic", "backward")
PARTS += ("augmentation", "loss", "update", "initialise", "inner loop")
PARTS += ("experts", "student steps", "student steps again")  # again: recomputed for the gradient


def _count_compiled() -> None:
    """Tell the counter of operations of the compiled convolutions: those of the plain sum."""

    def plain_sum(out: Sequence[int], channels: int) -> int:
        return 2 * 9 * channels * math.prod(out)

    ops = torch.ops.mim4dd

    @register_flop_formula(ops.convolve)
    def _(x, weight, turned, groups=1, *, out_shape, **_):  # type: ignore[no-untyped-def]
        return plain_sum(out_shape, x[1] // groups)

    @register_flop_formula(ops.convolve_grad_weight)
    def _(grad, x, groups=1, *, out_shape, **_):  # type: ignore[no-untyped-def]
        return plain_sum(grad, x[1] // groups)

    def convolved(x: Sequence[int], taps: Sequence[int], padding: int) -> int:
        return plain_sum((x[0], taps[1], *(side + 2 * padding - 2 for side in x[2:])), taps[0] // 9)

    @register_flop_formula(ops.first_block)
    def _(x, taps, scale, bias, eps, padding, *_, **__):  # type: ignore[no-untyped-def]
        return convolved(x, taps, padding)

    # What the gradients work out anew is not counted: it is the price of not keeping it.
    @register_flop_formula(ops.first_block_backward)
    def _(grad, x, taps, scale, bias, mean, rstd, padding, relu, pool, want_x, want_taps, **_):  # type: ignore[no-untyped-def]
        return (want_x + want_taps) * convolved(x, taps, padding)

    @register_flop_formula(ops.first_block_backward_twice)
    def _(of_x, of_taps, of_scale, of_bias, grad, x, taps, scale, bias, mean, rstd, padding, *_, **__):  # type: ignore[no-untyped-def]
        return 6 * convolved(x, taps, padding)


if extension.available():
    _count_compiled()


@contextlib.contextmanager
def annotated() -> Iterator[None]:
    """Names the parts from outside, so that the library carries no trace of it."""
    original: list[tuple[Any, str, Any]] = []

    def name(owner: Any, attribute: str, part: Callable[..., str] | str) -> None:
        function = getattr(owner, attribute)
        original.append((owner, attribute, function))

        def named(*args: Any, **kwargs: Any) -> Any:
            with record_function(part if isinstance(part, str) else part(*args, **kwargs)):
                return function(*args, **kwargs)

        setattr(owner, attribute, named)

    def side(images: torch.Tensor) -> str:
        return "synthetic" if images.requires_grad else "real"

    name(augment, "apply", "augmentation")
    name(augment, "sample", "augmentation")
    name(augment, "sample_each", "augmentation")
    name(Problem, "features", lambda self, network, images: f"forward {side(images)}")
    name(gradient, "_one_by_one", lambda network, images, labels: f"gradients {side(images)}")
    name(gradient, "_batched", lambda network, images, *_: f"gradients {side(images)}")
    name(gradient.GradientMatching, "train", "inner loop")
    name(trajectory.Experts, "weights", "experts")
    name(trajectory, "follow", "student steps")
    name(student, "loss_gradient", lambda *_: f"student steps{' again' * torch.is_grad_enabled()}")
    name(trajectory, "squared_distance", "loss")
    name(gradient, "gradient_distance", "loss")
    name(distribution.DistributionMatching, "distance", "loss")
    name(characteristic.CharacteristicMatching, "distance", "loss")  # its frequencies are drawn there
    for module in (gradient, distribution):
        name(module, "initialise", "initialise")
    name(torch.Tensor, "backward", "backward")
    name(torch.optim.SGD, "step", "update")
    try:
        yield
    finally:
        for owner, attribute, function in original:
            setattr(owner, attribute, function)


def positive(text: str) -> int:
    """What argparse makes of a count."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}, expected at least 1")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=METHODS, default="dm")
    parser.add_argument("--ipc", type=positive, default=10)
    parser.add_argument("--real-batch", type=positive, default=256)
    parser.add_argument("--width", type=positive, default=128)
    parser.add_argument("--precision", choices=precision.PRECISIONS, default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--iterations", type=positive, default=2)
    parser.add_argument("--trace", type=Path)
    options = parser.parse_args()
    try:
        device = pick_device(options.device)
        computing = precision.resolve(options.precision, device)
        if options.trace:
            options.trace.touch()  # rather now than after the work
    except (InputError, OSError) as error:
        parser.error(str(error))
    precision.configure(computing)
    with tempfile.TemporaryDirectory() as experts:
        show(options, device, computing, Path(experts))


def show(options: argparse.Namespace, device: torch.device, computing: str, experts: Path) -> None:
    """Print where the time goes; of trajectory matching, the experts go into the folder."""
    method = METHODS[options.method]
    problem = problems.problem(
        problems.real_images(1000, device),
        options.ipc,
        width=options.width,
        real_batch=options.real_batch,
        augmentation=problems.STRATEGY if method.augmented else "none",
        precision=computing,
        trajectory=problems.trajectory(experts, student_steps=20),  # about as many as in a run
    )
    objective = method.objective(problem)
    if isinstance(objective, gradient.GradientMatching):
        objective.inner = 1  # of its many epochs, one is enough to see
    start = problems.synthetic_set(problem, problems.synthetic_images(problem))

    update = Distillation(objective, start, method.image_lr[1], momentum=0.5).update

    def iterate() -> None:
        for _ in range(options.iterations):
            update()

    for _ in range(3):  # as it is, recorded, replayed
        update()
    wall = seconds(iterate, device)
    rate = matrix_rate(device, torch.bfloat16 if computing == "bf16" else torch.float32)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with mock.patch.object(graph, "WARM_UP", math.inf):  # no replays
        with FlopCounterMode(display=False) as counter:
            iterate()
        with annotated(), torch.profiler.profile(activities=activities) as profiler:
            profiled = seconds(iterate, device)
    if options.trace:
        profiler.export_chrome_trace(str(options.trace))
    print(
        f"{options.method}, IPC {options.ipc}, {options.real_batch} real images a class, "
        f"width {options.width}, "
        f"{computing} on {device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    spent = exclusive(profiler, on_device=device.type == "cuda")
    spent["rest"] = max(0.0, profiled - sum(spent.values()))
    for part, time_spent in spent.items():
        if time_spent:
            print(f"{part:20} {1e3 * time_spent / options.iterations:9.1f} ms {time_spent / profiled:5.0%}")
    print(f"{'an iteration':20} {1e3 * wall / options.iterations:9.1f} ms (unprofiled)")
    work = counter.get_total_flops()
    print(
        f"convolutions and products: {work / options.iterations / 1e9:.0f} GFLOP, {work / wall / 1e9:.0f} "
        f"GFLOP/s, {work / wall / rate:.0%} of the {rate / 1e9:.0f} GFLOP/s of a square {computing} product"
    )


def exclusive(profiler: torch.profiler.profile, *, on_device: bool) -> dict[str, float]:
    """Seconds in each part without the parts inside it."""
    spent = dict.fromkeys(PARTS, 0.0)

    def total(event: Any) -> float:
        return (event.device_time_total if on_device else event.cpu_time_total) / 1e6

    def visit(event: Any, part: str | None) -> None:
        if event.name in spent:
            if part is not None:
                spent[part] -= total(event)
            part = event.name
            spent[part] += total(event)
        for child in event.cpu_children:
            visit(child, part)

    for event in profiler.events():
        if event.cpu_parent is None and event.device_type == torch.autograd.DeviceType.CPU:
            visit(event, None)
    return spent


if __name__ == "__main__":
    main()
