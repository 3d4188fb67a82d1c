"""What the command lines show: progress with rate and time left, and tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

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

console = Console(highlight=False)


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


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table whose last row stands out."""
    table = Table(*columns, title=title, title_justify="left")
    cells = [[str(cell) for cell in row] for row in rows]
    for k, row in enumerate(cells):
        table.add_row(*row, style="bold" if k == len(cells) - 1 else None)
    console.print(table)
