"""What people see of progress: bars on a terminal, lines elsewhere, and how long it will take."""

import io

import pytest
from rich.console import Console

from mim4dd.commands import console


@pytest.fixture
def shown(monkeypatch):
    """What is shown of four of ten steps that take so many seconds each."""

    def show(seconds, **options):
        output, clock = io.StringIO(), [0.0]
        there = Console(file=output, width=100, get_time=lambda: clock[0], **options)
        monkeypatch.setattr(console, "console", there)
        with console.steps("distil", 10) as advance_to:
            for done in range(1, 5):
                clock[0] += seconds
                advance_to(done, "loss 1")
        return output.getvalue()

    return show


@pytest.mark.parametrize("seconds", [5, 100])
def test_however_slow_the_steps_are_the_time_left_is_told(shown, seconds):
    assert f"distil 4/10  loss 1  {6 * seconds} s left" in shown(seconds)


@pytest.mark.parametrize(("term", "bars"), [("xterm", True), ("dumb", False)])
def test_a_dumb_terminal_gets_lines_as_a_file_does(shown, term, bars):
    output = shown(1, force_terminal=True, _environ={"TERM": term})
    assert any(line.startswith("distil 4/10  loss 1") for line in output.splitlines()) is not bars
    assert ("\x1b[" in output) is bars
