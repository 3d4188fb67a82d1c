"""A command line without the packages of its extra."""

import json
import os
import re
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


@pytest.mark.parametrize(
    ("module", "package"),
    [("run", "rich"), ("evaluate", "tyro"), ("compare", "scipy"), ("tune", "typeguard"), ("run", "sklearn")],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, module, package):
    (tmp_path / "sitecustomize.py").write_text(HIDING.format(package))
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = command(module=module, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
    install = "pip install --no-build-isolation -e '.[run]'"
    assert done.stderr == f"mim4dd: the package {package} is missing; {install} installs it\n"
    assert done.returncode == 2


def test_every_package_of_the_extra_is_known():
    (listed,) = re.findall(r"^run = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.M)
    names = {IMPORTED_AS.get(name, name) for name in json.loads(listed)}
    assert names == {*extras.AT_ONCE, *extras.LATER}
