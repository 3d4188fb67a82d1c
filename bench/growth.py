"""Time and memory of an iteration against images per class, classes, image size and real batch, as a plot.

    python -m bench.growth [--method dm] [--width 16]

Writes bench/results/growth-<method>-<device>.png. One quantity grows at a time from 10 images per class, 10
classes of 3x32x32 and 32 real images a class; images are random, and the width is small, so that it takes a
minute or two on a CPU. Memory is the peak of a first iteration above what was there before it, each in a
process of its own. An iteration is that of the images: of gradient matching without the training of its
network, of trajectory matching with two student steps, of at most 256 images.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from bench import problems
from bench.measure import extra_peak, seconds
from mim4dd import distill
from mim4dd.networks import precision
from mim4dd.objectives import METHODS, GradientMatching

BASE = {"ipc": 10, "classes": 10, "side": 32, "real_batch": 32}
GROWTH = {
    "ipc": (1, 3, 10, 30, 100),
    "classes": (10, 30, 100, 300, 1000),
    "side": (28, 56, 112, 224),
    "real_batch": (16, 64, 256, 1024),
}
NAMES = {
    "ipc": "images per class",
    "classes": "classes",
    "side": "pixels a side",
    "real_batch": "real images a class",
}


def measure(method: str, width: int, sizes: dict[str, int]) -> tuple[float, float]:
    """Seconds and MiB of an iteration."""
    with tempfile.TemporaryDirectory() as folder:
        return _measure(method, width, sizes, Path(folder))


def _measure(method: str, width: int, sizes: dict[str, int], experts: Path) -> tuple[float, float]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ipc, classes, side, real_batch = (sizes[name] for name in ("ipc", "classes", "side", "real_batch"))
    real = problems.real_images(4, device, classes, (3, side, side))  # a class is cycled through
    problem = problems.problem(
        real,
        ipc,
        width=width,
        real_batch=real_batch,
        augmentation=problems.STRATEGY if METHODS[method].augmented else "none",
        precision=precision.resolve("auto", device),
        trajectory=problems.trajectory(experts, student_steps=2, student_batch=256),
    )
    objective = METHODS[method].objective(problem)
    if isinstance(objective, GradientMatching):
        objective.inner = 0
    start = problems.synthetic_set(problem, problems.synthetic_images(problem))

    def iterate() -> None:
        distill.distill(objective, start, iterations=1, lr=0.1, momentum=0.5)

    peak = extra_peak(iterate, device)
    return min(seconds(iterate, device) for _ in range(2)), peak / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=METHODS, default="dm")
    parser.add_argument("--width", type=int, default=16)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figure, axes = plt.subplots(1, len(GROWTH), figsize=(14, 3.4), sharey=True, layout="constrained")
    right = [axis.twinx() for axis in axes]
    for axis, other, (quantity, values) in zip(axes, right, GROWTH.items(), strict=True):
        points = []
        for value in values:
            with multiprocessing.get_context("spawn").Pool(1) as alone:
                sizes = {**BASE, quantity: value}
                points.append(alone.apply(measure, (options.method, options.width, sizes)))
        print(quantity, *(f"{v}: {s:.3f} s {m:.0f} MiB" for v, (s, m) in zip(values, points, strict=True)))
        (time_line,) = axis.loglog(values, [s for s, _ in points], "o-", label="seconds")
        other.sharey(right[0])
        (memory_line,) = other.loglog(values, [m for _, m in points], "s--", color="tab:orange", label="MiB")
        axis.set_xlabel(NAMES[quantity])
        axis.set_xticks(values, map(str, values))
        axis.minorticks_off()
    axes[0].set_ylabel("seconds")
    right[-1].set_ylabel("MiB above the start")
    figure.legend(handles=[time_line, memory_line], loc="outside upper right", ncols=2)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    figure.suptitle(f"An iteration of {options.method}, width {options.width}, {name}")
    path = Path(__file__).parent / "results" / f"growth-{options.method}-{device.type}.png"
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
