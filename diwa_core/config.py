"""Configuration is a dataclass read from YAML; an unknown key is an error with a suggestion."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from diwa_core.errors import ConfigError

T = TypeVar("T")


def from_dict(cls: type[T], values: dict[str, Any], where: str = "configuration") -> T:
    """Build dataclass `cls` from a mapping, nested dataclasses included; raises ConfigError on unknown keys or wrong types."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected a mapping, found {type(values).__name__}.")
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            close = difflib.get_close_matches(str(key), names, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else f" Known keys: {', '.join(names)}."
            raise ConfigError(f"{where}: unknown key '{key}'.{hint}")
    arguments = {key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()}
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Check `value` against a type hint and convert what YAML cannot express (tuples, int to float)."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, found {value!r}.")
        return origin(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected a mapping, found {value!r}.")
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool)):
        raise ConfigError(f"{where}: expected {hint.__name__}, found {value!r}.")
    return value


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases: nested ones would expand without bound when printed."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed here")
        return super().compose_node(parent, index)


def parse_untrusted_yaml(text: str | bytes) -> Any:
    """Plain values of a YAML text that came from elsewhere. Raises ConfigError."""
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except Exception as error:  # PyYAML answers malformed scalars with KeyError, IndexError, AttributeError and others
        raise ConfigError(f"expected YAML, found {text[:60]!r}: {error}.") from error


def load_yaml(cls: type[T], path: str | Path) -> T:
    """Read dataclass `cls` from a YAML file; raises ConfigError naming the file."""
    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except Exception as error:  # as above, and files that are no text
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    return from_dict(cls, values, str(path))


def to_dict(value: Any) -> Any:
    """Plain lists and mappings of a dataclass, ready for YAML or JSON."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [to_dict(item) for item in value]
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    return value
