"""A command line without the packages of its extra."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import command

from mim4dd import extras

ROOT = Path(__file__).parent.parent
IMPORTED_AS = {"scikit-learn": "sklearn", "pillow": "PIL"}


HIDING = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == {!r} else find(name, *rest)
"""


def without(package, folder):
    """The environment of a process for which a package is not installed."""
    (folder / "sitecustomize.py").write_text(HIDING.format(package))
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


@pytest.mark.parametrize(
    ("module", "package"),
    [("run", "rich"), ("evaluate", "tyro"), ("compare", "scipy"), ("tune", "typeguard"), ("run", "sklearn")],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, module, package):
    done = command(module=module, cwd=tmp_path, env=without(package, tmp_path))
    install = "pip install --no-build-isolation -e '.[run]'"
    assert done.stderr == f"mim4dd: the package {package} is missing; {install} installs it\n"
    assert done.returncode == 2


def test_a_program_that_imports_a_command_line_gets_an_import_error(tmp_path):
    program = "try:\n    import mim4dd.run\nexcept ModuleNotFoundError as error:\n    print(error.name)"
    environment = without("rich", tmp_path)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "rich\n")


def test_every_package_of_the_extra_is_known():
    (listed,) = re.findall(r"^run = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.M)
    names = {IMPORTED_AS.get(name, name) for name in json.loads(listed)}
    assert names == {*extras.AT_ONCE, *extras.LATER}
