"""A step as a CUDA graph: recorded at its second call, then replayed without Python or single launches."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

# Calls that are not recorded. The first makes all that lasts: compiled kernels, the convolutions' plans, the
# libraries' workspaces for the stream of the recording, momenta, calibrated noise ratios. The second is like
# all that follow, so it is recorded.
WARM_UP = 1

Result = TypeVar("Result")


def replayed(
    step: Callable[..., Result], generators: Sequence[torch.Generator], device: torch.device
) -> Callable[..., Result]:
    """Return `step`, which on a GPU is recorded at its second call and replayed from then on.

    A replay launches the same kernels on the same memory. So the step must make at its first call all that it
    keeps, do the same work at every later one, read nothing on the host, and change lasting tensors in place;
    only its arguments may change from outside. What it returns is overwritten by the next call. Every call
    counts: the first one runs as it is, and the random draws continue, so that only the time differs.

    Args:
        step: takes tensors on the device, of a few different shapes, each of which is recorded.
        generators: all that it draws from.
        device: where it runs; on a CPU the step is returned as it is.

    Warns:
        UserWarning: it cannot be recorded, and why; it goes on as it is.
    """
    return Replayed(step, generators, device) if device.type == "cuda" else step


class Replayed(Generic[Result]):
    """What `replayed` returns on a GPU."""

    def __init__(
        self, step: Callable[..., Result], generators: Sequence[torch.Generator], device: torch.device
    ) -> None:
        self.step, self.generators, self.device = step, generators, device
        self.calls: Counter[tuple[torch.Size, ...]] = Counter()
        self.recordings: dict[tuple[torch.Size, ...], Callable[..., Result]] = {}

    def __call__(self, *inputs: Tensor) -> Result:
        """Return what the step returns for these inputs."""
        shapes = tuple(tensor.shape for tensor in inputs)
        self.calls[shapes] += 1
        if self.calls[shapes] <= WARM_UP:
            return _aside(self.step, inputs, self.device)
        if shapes not in self.recordings:
            self.recordings[shapes] = self._recorded(inputs)
        return self.recordings[shapes](*inputs)

    def _recorded(self, inputs: Sequence[Tensor]) -> Callable[..., Result]:
        try:
            return _record(self.step, inputs, self.generators, self.device)
        except RuntimeError as error:
            # The end of a recording that failed says no more than that it did; what failed comes before.
            cause = str(error.__context__ or error).partition("\n")[0]
            warnings.warn(
                f"mim4dd: a step cannot be recorded as a CUDA graph and runs slower without one ({cause})",
                stacklevel=3,
            )
            # The other recordings draw from generator states that were replaced meanwhile; of steps that
            # cannot be recorded, it need not be tried again.
            self.recordings = {shapes: r for shapes, r in self.recordings.items() if r is self.step}
            return self.step


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _aside(step: Callable[..., Result], inputs: Sequence[Tensor], device: torch.device) -> Result:
    """Run a step on the stream that it will be recorded on, as torch asks for before a recording."""
    here, aside = torch.cuda.current_stream(device), _stream(device)
    aside.wait_stream(here)
    with torch.cuda.stream(aside), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
        result = step(*inputs)
    here.wait_stream(aside)
    return result


def _record(
    step: Callable[..., Result],
    inputs: Sequence[Tensor],
    generators: Sequence[torch.Generator],
    device: torch.device,
) -> Callable[..., Result]:
    """Record a step without running it; return what replays it.

    Raises:
        RuntimeError: it did what cannot be recorded; its generators are as they were.
    """
    held = [tensor.clone() for tensor in inputs]
    graph = torch.cuda.CUDAGraph()
    if torch.__version__ < "2.14":  # from then on a graph sees by itself what is drawn from
        for generator in generators:
            graph.register_generator_state(generator)
    # A recording that fails leaves its generators in a state of being recorded: they go on with a copy.
    states = [generator.clone_state() for generator in generators]
    try:
        # The outer context brings the current stream back where a failure keeps the inner one from it.
        with torch.cuda.stream(_stream(device)), torch.cuda.graph(graph, stream=_stream(device)):
            result = step(*held)
    except RuntimeError:
        for generator, state in zip(generators, states, strict=True):
            generator.graphsafe_set_state(state)
        raise

    # Up to torch 2.12 a recording resets the generators' offsets, on its stream. On a GPU that is shared that
    # may come late, and must not undo what the first replay sets.
    torch.cuda.current_stream(device).wait_stream(_stream(device))

    def replay(*inputs: Tensor) -> Result:
        for kept, given in zip(held, inputs, strict=True):
            kept.copy_(given)
        graph.replay()
        return result

    return replay
