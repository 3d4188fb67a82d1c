"""Command lines made from the settings: that of `run`, and those that add options to it or remove some."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from ..config import Config
from ..files import expanded
from .config_json import read_config

T = TypeVar("T")
Hidden = tyro.conf.Suppress[tyro.conf.Fixed[T]]  # a setting that is no option of this command line


def read(kind: type[T], prog: str, arguments: Sequence[str] | None) -> T:
    """Read a command line (None: the process's own) into `kind`, `Config` or a subclass.

    What it leaves out comes from the file that --config names, if any.

    Raises:
        InputError: the file cannot be read, or holds something else; or the ~name of a path is no user.
        SystemExit: what tyro does on --help and on unknown options (with 2).
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path, nargs="?")  # without a path tyro complains
    path = first.parse_known_args(arguments)[0].config
    settings = tyro.cli(
        kind,
        prog=prog,
        args=arguments,
        default=read_config(expanded(path), kind) if path else kind(),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return _at_home(settings)


def _at_home(settings: T) -> T:
    """Return settings with ~ of every path expanded, as no shell does in --out=~/there."""
    values: dict[str, Any] = {}
    for name, value in vars(settings).items():
        if isinstance(value, Path):
            values[name] = expanded(value)
        elif dataclasses.is_dataclass(value):
            values[name] = _at_home(value)
    return dataclasses.replace(settings, **values) if values else settings  # type: ignore[type-var]


def recast(kind: type[T], settings: Any) -> T:
    """Return `settings` as another class of settings: the fields both have are taken over, others default."""
    types: dict[str, Any] = typing.get_type_hints(kind)
    values = {
        name: recast(types[name], value) if dataclasses.is_dataclass(types[name]) else value
        for name, value in vars(settings).items()
        if name in types
    }
    return kind(**values)


def plain(settings: Config) -> Config:
    """Return the settings of a run alone, without the options that a subclass adds."""
    return recast(Config, settings)
