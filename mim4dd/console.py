"""What the command lines show: progress with rate and time left, and tables."""

from __future__ import annotations

import errno
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError

from .distill import DivergenceError
from .errors import InputError
from .evaluation import Score

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk or a quota
console = Console(highlight=False, markup=False)


def guarded(command: Callable[[], int | None]) -> int:
    """Run a command line; return its exit code.

    1: diverged, or no room in memory or on the disk; 2: the user's mistake; 130: interrupted or terminated;
    141: nobody reads the output any more.
    """
    try:
        try:
            with _termination_interrupts():
                return command() or 0
        finally:
            sys.stdout.flush()  # now, not when Python ends and can only complain
    except BrokenPipeError:  # as after `| head`: what is left goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except InputError as error:
        complain(str(error))
        return 2
    except DivergenceError as error:
        complain(str(error))
        return 1
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in FULL:
            raise
        complain(f"a file could not be written ({error}); make room: what was saved before is as it was")
        return 1
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        complain(
            f"out of memory ({str(error).splitlines()[0]}); take less with --memory-budget (on a GPU), "
            "--real-batch, --width, --ipc or --image-size"
        )
        return 1
    except KeyboardInterrupt:
        complain("interrupted")
        return 130


@contextmanager
def _termination_interrupts() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does: a cluster sends it when the time is up."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only that one gets signals
        return

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: another would interrupt the saving
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _out_of_memory(error: Exception) -> bool:
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator: can't allocate" in str(error)


def complain(message: str) -> None:
    """Tell what went wrong, apart from the output."""
    sys.stderr.write(f"mim4dd: {message}\n")


def about(seconds: float) -> str:
    """Return a time for people."""
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {seconds:.0f} s"


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:.2f}/s")


class Steps:
    """One bar; on a dumb terminal or in a file, a line every tenth of the way instead."""

    def __init__(self, bar: Progress, title: str, total: int) -> None:
        self._bar = bar
        self._title = title
        self._total = total
        self._task = bar.add_task(title, total=total, note="")
        self._printed = 0

    def advance_to(self, done: int, note: str) -> None:
        """Show that `done` of the total are done, with a note."""
        self._bar.update(self._task, completed=done, note=note)
        if not console.is_terminal and (done - self._printed >= self._total / 10 or done == self._total):
            left = self._bar.tasks[self._task].time_remaining
            console.print(
                f"{self._title} {done}/{self._total}  {note}" + (f"  {left:.0f} s left" if left else "")
            )
            self._printed = done


@contextmanager
def steps(title: str, total: int) -> Iterator[Steps]:
    """Show the progress of `total` steps."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate())
    with Progress(
        *columns,
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        yield Steps(bar, title, total)


def prepared(title: str, progress: Iterable[tuple[int, int]]) -> None:
    """Go through what yields (steps done, steps in all) under a bar, if there is any to do."""
    with ExitStack() as stack:
        bar = None
        for done, total in progress:
            bar = bar or stack.enter_context(steps(title, total))
            bar.advance_to(done, "")


def with_accuracy(title: str, num_networks: int, score: Callable[..., Score]) -> Score:
    """Call `score(on_network=...)` under a bar that shows the mean accuracy so far."""
    with steps(title, num_networks) as bar:
        accuracies: list[float] = []

        def look(accuracy: float) -> None:
            accuracies.append(accuracy)
            bar.advance_to(len(accuracies), f"accuracy {Score(tuple(accuracies))}")

        return score(on_network=look)


def on_architectures(
    names: Iterable[str], num_networks: int, score: Callable[..., Score]
) -> dict[str, Score]:
    """Call `score(architecture=..., on_network=...)` for each architecture, each under a bar."""
    return {
        name: with_accuracy(f"evaluate ({name})", num_networks, functools.partial(score, architecture=name))
        for name in names
    }


def print_architectures(title: str, scores: Mapping[str, Score]) -> None:
    """Print a table of accuracies by architecture."""
    print_table(
        title,
        ("network", "accuracy", "networks"),
        ((name, score, len(score.accuracies)) for name, score in scores.items()),
        strong_last=False,
    )


def print_table(
    title: str, columns: Iterable[str], rows: Iterable[Iterable[object]], *, strong_last: bool = True
) -> None:
    """Print a table; its last row may stand out."""
    console.print(title, style="italic")
    table = Table(*columns)
    cells = [[str(cell) for cell in row] for row in rows]
    for k, row in enumerate(cells):
        table.add_row(*row, style="bold" if strong_last and k == len(cells) - 1 else None)
    console.print(table)
