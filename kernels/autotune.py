"""MIM4DD_AUTOTUNE=1: time the entries of the launch table for each new kind of call, keep the best on disk.

Off by default, as the table is chosen for the sizes of use and a search delays the first call of every kind.
The file is launch-<device>-triton-<version>-<table>.json in $MIM4DD_CACHE (default: ~/.cache/mim4dd), shared
by processes; delete it to search anew in the next one. A file of another table, or a damaged one, is ignored.
"""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import torch
import triton
from filelock import FileLock
from torch import Tensor

from mim4dd.files import cache_folder, write

from . import launch
from .launch import Tile

REPEATS = 5

# By file, the tiles of each kind of call: every call looks here, only the first of a kind at the disk.
Known = dict[str, dict[str, dict]]
_known: dict[Path, Known] = {}


def tuned(
    kind: str, tables: list[str], features: Tensor, call: Callable[[], object]
) -> AbstractContextManager[None]:
    """Return a context in which `call` runs with the best entries of `tables`; search if not known yet.

    Args:
        kind: what the choice is kept by; calls of one kind share it.
        tables: names of the tables the call chooses from, searched one after the other.
        features: as in `launch.choose`.
        call: runs the call once.
    """
    path = _path(features.device)
    known = _known.get(path, {})
    if kind not in known:
        known = _read(path)
        if kind not in known:
            best: dict[str, Tile] = {}
            for table in tables:
                seconds = {}
                for tile in launch.fitting(table, features):
                    with launch.forced({**best, table: tile}):
                        seconds[tile] = _seconds(call, features.device)
                best[table] = min(seconds, key=seconds.__getitem__)
            known = _add(path, {kind: {table: asdict(tile) for table, tile in best.items()}})
        _known[path] = known
    return launch.forced({table: Tile(**tile) for table, tile in known[kind].items()})


def _read(path: Path) -> Known:
    try:
        known = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _add(path: Path, new: Known) -> Known:
    """Write the file with `new` and what other processes have added meanwhile; returns all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        known = _read(path) | new
        write(path, json.dumps(known, indent=1) + "\n")  # at once, for readers take no lock
    return known


def _path(device: torch.device) -> Path:
    name = torch.cuda.get_device_name(device).replace(" ", "-") if device.type == "cuda" else device.type
    table = hashlib.sha256(repr(launch.TABLES).encode()).hexdigest()[:8]
    return cache_folder() / f"launch-{name}-triton-{triton.__version__}-{table}.json"


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The shortest of a few runs, after one that compiles."""
    times = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])
