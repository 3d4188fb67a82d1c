"""The parts of the package import each other one way, as README.md draws it, and all are installed."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent


def module_of(path):
    """As it is installed: kernels/ is mim4dd.kernels."""
    inside = path.relative_to(ROOT).with_suffix("").parts
    parts = inside if inside[0] == "mim4dd" else ("mim4dd", *inside)
    return parts[:-1] if path.stem == "__init__" else parts


PACKAGE = [path for path in (ROOT / "mim4dd").rglob("*.py") if "kernels" not in path.parts]
MODULES = {module_of(path): path for path in [*PACKAGE, *(ROOT / "kernels").glob("*.py")]}


def imported(module, path):
    """Yield the modules of the package that one imports, wherever in the file."""
    package = module if path.stem == "__init__" else module[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = (*package[: len(package) - node.level + 1],) if node.level else ()
            base += tuple((node.module or "").split(".")) if node.module else ()
            for alias in node.names:
                found = (*base, alias.name)
                if (found := found if found in MODULES else base) in MODULES:
                    yield found


def test_parts_import_each_other_one_way():
    # A part is a folder, or a file beside them. The kernels take constants and paths from two leaves.
    leaves = {("mim4dd", "losses", "form"), ("mim4dd", "files")}
    parts = {}
    for module, path in MODULES.items():
        others = {other for other in imported(module, path) if other[:2] != module[:2]}
        if module[1:2] == ("kernels",):
            assert others <= leaves, module
            continue
        parts.setdefault(module[:2], set()).update(other[:2] for other in others)
    order = [part[-1] for part in TopologicalSorter(parts).static_order()]  # raises an error of a cycle
    chain = ["kernels", "losses", "objectives", "distill", "experiment", "commands", "run"]
    assert [part for part in order if part in chain] == chain
    assert len(order) > 30


def test_every_folder_is_installed():
    named = (ROOT / "pyproject.toml").read_text()
    for module, path in MODULES.items():
        assert path.stem != "__init__" or f'"{".".join(module)}",' in named, path
