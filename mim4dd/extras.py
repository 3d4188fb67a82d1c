"""The packages that the command lines need beside those of the library, and the message if one is missing.

A command line imports this before all else: without them it ends here, with one line instead of a traceback.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

import __main__

AT_ONCE = ("jinja2", "matplotlib", "PIL", "rich", "scipy", "tyro", "typeguard")
LATER = ("pyarrow", "sklearn")  # by some data, and by k-means: `exits.guarded` tells of these


def missing(package: str) -> str:
    """Return the message for a missing package, with the command that installs it."""
    extra = "tune" if package == "optuna" else "run"
    return f"the package {package} is missing; pip install --no-build-isolation -e '.[{extra}]' installs it"


if __main__.__package__ == __package__:  # other programs that import a command line get Python's own error
    for package in AT_ONCE:
        if find_spec(package) is None:
            sys.stderr.write(f"mim4dd: {missing(package)}\n")
            sys.exit(2)
