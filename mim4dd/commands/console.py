"""What the command lines show: progress with rate and time left, and tables."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress

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

from ..evaluation import Score


class _Console(Console):
    def on_broken_pipe(self) -> None:  # rich would end the process here, with nothing saved
        raise


console = _Console(highlight=False, markup=False)
SLOWEST = 3600.0  # seconds that a rate averages over: a step may take minutes


def complain(message: str) -> None:
    """Print to stderr what went wrong."""
    with suppress(OSError):  # a message that cannot be printed changes no exit code
        if sys.stderr:  # which may be closed
            sys.stderr.write(f"mim4dd: {message}\n")


def about(seconds: float) -> str:
    """Return a readable time."""
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {seconds:.0f} s"


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:.2f}/s")


def _has_bars() -> bool:
    return console.is_terminal and not console.is_dumb_terminal


@contextmanager
def steps(title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Show the progress of `total` steps; yields what is to be called with how many are done, and a note.

    A bar; on a dumb terminal or in a file, a line every tenth of the way instead.
    """
    printed = 0
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not _has_bars(),
        speed_estimate_period=SLOWEST,
    ) as bar:
        task = bar.add_task(title, total=total, note="")

        def advance_to(done: int, note: str) -> None:
            nonlocal printed
            bar.update(task, completed=done, note=note)
            if not _has_bars() and (done - printed >= total / 10 or done == total):
                left = bar.tasks[task].time_remaining
                console.print(f"{title} {done}/{total}  {note}" + (f"  {left:.0f} s left" if left else ""))
                printed = done

        yield advance_to


def prepared(title: str, progress: Iterable[tuple[int, int]]) -> None:
    """Go through what yields (steps done, steps in all) under a bar, if there is any to do."""
    with ExitStack() as stack:
        advance_to = None
        for done, total in progress:
            advance_to = advance_to or stack.enter_context(steps(title, total))
            advance_to(done, "")


def with_accuracy(title: str, num_networks: int, score: Callable[..., Score]) -> Score:
    """Call `score(on_network=...)` under a bar that shows the mean accuracy so far."""
    with steps(title, num_networks) as advance_to:
        accuracies: list[float] = []

        def look(accuracy: float) -> None:
            accuracies.append(accuracy)
            advance_to(len(accuracies), f"accuracy {Score(tuple(accuracies))}")

        return score(on_network=look)


def on_architectures(
    names: Iterable[str], num_networks: int, score: Callable[..., Score]
) -> dict[str, Score]:
    """Call `score(architecture=..., on_network=...)` for each architecture, each under a bar."""
    return {
        name: with_accuracy(f"evaluate ({name})", num_networks, functools.partial(score, architecture=name))
        for name in names
    }


def print_table(
    title: str, columns: Iterable[str], rows: Iterable[Iterable[object]], *, strong_last: bool = False
) -> None:
    """Print a table; its last row may stand out."""
    console.print(title, style="italic")
    table = Table(*columns)
    cells = [[str(cell) for cell in row] for row in rows]
    for k, row in enumerate(cells):
        table.add_row(*row, style="bold" if strong_last and k == len(cells) - 1 else None)
    console.print(table)
