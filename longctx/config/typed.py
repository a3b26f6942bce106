"""From dictionaries, as YAML, checkpoints and command lines hold them, to typed settings."""

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

from longctx.errors import UserError

T = TypeVar("T")


def build(kind: type[T], values: dict[str, Any], where: str) -> T:
    """A dataclass and its parts from nested dictionaries, as `dataclasses.asdict` makes them.

    Args:
        kind: the dataclass.
        values: a value for every field. One with a default may be missing: earlier versions did
            not have it, and the default is what they did.
        where: what is being read, for the message.

    Raises:
        UserError: if a key is missing or unknown, for example from another version, or if a value
            is not allowed.
    """
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    bare = {n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    if odd := sorted((bare - set(values)) | (set(values) - set(known))):
        raise UserError(f"{where} was written by another version of longctx: {', '.join(odd)}")
    hints = get_type_hints(kind)
    parts = {
        key: build(hints[key], value, f"{where}.{key}") if is_dataclass(hints[key]) else value
        for key, value in values.items()
    }
    return kind(**parts)


def from_user(kind: type[T], values: Mapping[str, Any], where: str, whose: str) -> T:
    """A flat dataclass from what a user wrote.

    Args:
        kind: a dataclass whose fields are `int | float | str | bool`, or any other type, which is
            then not checked.
        values: by field; those with a default may be left out.
        where: name of the group of settings, for messages.
        whose: settings these are, for messages.

    Raises:
        UserError: if one is unknown, missing or of another type.
    """
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    hints = get_type_hints(kind)
    for key, value in values.items():
        if key not in known:
            names = ", ".join(known) or "no settings of its own"
            raise UserError(f"{where}.{key} is no setting of {whose}: it has {names}")
        fits = {float: (int, float)}.get(hints[key], hints[key])
        if hints[key] in _SCALARS and (type(value) is bool) != (hints[key] is bool):
            fits = ()
        if hints[key] in _SCALARS and not isinstance(value, fits):
            raise UserError(f"{where}.{key}={value!r} must be {_SCALARS[hints[key]]}")
    for key, field in known.items():
        if key not in values and field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"{whose} needs {where}.{key}")
    return kind(**values)


_SCALARS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def choice(value: str, allowed: tuple[str, ...], key: str) -> None:
    """Raises UserError unless `value` is one of `allowed`; `key` names the setting."""
    if value not in allowed:
        raise UserError(f"{key}={value!r} is not one of {', '.join(allowed)}")


def positive(value: float, key: str) -> None:
    """Raises UserError unless `value` is above zero; `key` names the setting."""
    if not value > 0:
        raise UserError(f"{key}={value} must be above 0")
