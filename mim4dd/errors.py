"""Errors that the user can fix; the command lines print them in a line or two and exit with 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Some input is wrong: the text names the value, what was expected and what to do."""


def unknown(kind: str, name: str, names: Iterable[str], also: str = "") -> InputError:
    """Return the error for a name that is not among `names`, with those that come close."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f", did you mean {' or '.join(close)}?" if close else "."
    return InputError(f"unknown {kind} {name!r}{hint} Expected one of {', '.join(names)}{also}")
