"""Settings as JSON, in the files of a run and in those that --config names."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any, TypeVar

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from ..config import Config
from ..errors import InputError, unknown

T = TypeVar("T")


def to_json(config: Config) -> dict[str, Any]:
    """Return the settings as JSON-able values; `from_json` reads them back."""
    settings = dataclasses.asdict(config)
    del settings["config"]  # its settings are all in here
    return json.loads(json.dumps(settings, default=str))


def read_config(path: Path, kind: type[T]) -> T:
    """Read settings from a JSON file of `to_json`'s form, or from a result.json that holds one as "config".

    They become a `kind`, `Config` or a subclass; what the file does not give has its default. The folder of
    that result is not taken over.

    Raises:
        InputError: no such file, not JSON, an unknown setting, or a value that it cannot have.
    """
    try:
        settings = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"--config {path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"--config {path} is not JSON ({error})") from error
    given = settings.get("config", settings) if isinstance(settings, dict) else settings
    return dataclasses.replace(_from_json(Config, given, str(path), kind), out=None, overwrite=False)


def from_json(settings: Any, source: str) -> Config:
    """Return the configuration that `to_json` turned into `settings`; errors call it `source`.

    Raises:
        InputError: an unknown setting, a value that it cannot have, or no settings at all.
    """
    return _from_json(Config, settings, source, Config)


def _checked(name: str, value: Any, kind: Any, where: str) -> Any:
    """Return a value of JSON as one of type `kind`."""
    try:
        if isinstance(value, bool) and kind is not bool:
            raise TypeCheckError("a truth value")
        if isinstance(value, str) and Path in typing.get_args(kind):
            value = Path(value)
        elif isinstance(value, list):
            value = tuple(value)
        return check_type(value, kind, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
    except TypeCheckError as error:
        expected = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
        raise InputError(f"{where}: {name} is {json.dumps(value)}, expected {expected}") from error


def _from_json(kind: Any, settings: Any, where: str, made: Any) -> Any:
    """Return JSON settings, checked against `kind`, as a `made`: `kind` or a subclass."""
    if not isinstance(settings, dict):
        raise InputError(f"{where}: expected an object of settings, got {settings!r}")
    types, into = typing.get_type_hints(kind), typing.get_type_hints(made)
    values = {}
    for name, value in settings.items():
        if name not in types:
            raise unknown(f"setting in {where}:", name, types)
        if dataclasses.is_dataclass(types[name]):
            value = _from_json(types[name], value, where, into[name])
        else:
            value = _checked(name, value, into[name], where)
        values[name] = value
    return made(**values)
