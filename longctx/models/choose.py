"""From what a user writes (a name, a mapping) to an attention method or a rope, or one clear line.

Costs the import of the attention methods, which need torch only.
"""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from longctx.config.rope import RopeConfig
from longctx.errors import UserError

FLAT = "longctx_attention_"  # of the methods' files in a checkpoint that has its code beside it
BESIDE = not __name__.startswith("longctx.")  # this file is in such a checkpoint

# A method's fields: how their types are called, and what is one.
KINDS: dict[Any, tuple[str, tuple[type, ...]]] = {
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    bool: ("true or false", (bool,)),
    str: ("a name", (str,)),
    Sequence[int]: ("a list of whole numbers", ()),
    type(None): ("", (type(None),)),
}

Attention = str | Mapping[str, Any] | None
Rope = RopeConfig | Mapping[str, Any] | str | None


def attention_methods() -> list[str]:
    """Names of the methods in `longctx/attention/`, or of those that came with a checkpoint."""
    here = Path(__file__).parent
    files = here.glob(f"{FLAT}*.py") if BESIDE else (here.parent / "attention").glob("[!_]*.py")
    names = sorted(file.stem.removeprefix(FLAT) for file in files)
    return [name for name in names if hasattr(_module(name), "NAME")]


def attention_method(attention: str | Mapping[str, Any]) -> Any:
    """The method of that name with its numbers: an instance of its module's dataclass.

    Raises:
        UserError: if the name or one of the numbers is unknown.
    """
    given = {"name": attention} if isinstance(attention, str) else dict(attention)
    name = given.pop("name", None)
    available = attention_methods()
    if name not in available:
        raise UserError(f"attention.name={name!r} is not one of {', '.join(available)}")
    numbers = _module(name).NUMBERS
    known = [field.name for field in dataclasses.fields(numbers)]
    for key in given:
        if key not in known:
            raise UserError(
                f"attention.{key} is not a number of {name!r}: it has {', '.join(known) or 'none'}"
            )
        _require_kind(get_type_hints(numbers)[key], given[key], f"attention.{key}")
    try:
        return numbers(**given)
    except TypeError as error:
        raise UserError(f"attention={name}: {error}") from error


def _require_kind(hint: Any, value: Any, key: str) -> None:
    """Raises UserError if a value is not of the type that a method's field has."""
    kinds = get_args(hint) or (hint,)
    if isinstance(value, list | tuple) and all(type(entry) is int for entry in value):
        fits = Sequence[int] in kinds
    else:
        fits = any(type(value) in KINDS[kind][1] for kind in kinds)
    if not fits:
        words = " or ".join(KINDS[kind][0] for kind in kinds if kind is not type(None))
        raise UserError(f"{key}={value!r} must be {words}")


def in_words(record: Mapping[str, Any]) -> str:
    """A method with its numbers, as a run prints it; runs of layers are `first..last`.

    >>> in_words({"name": "longgen_window", "sink_tokens": 64, "full_layers": [10, 11, 12]})
    'longgen_window(sink_tokens=64, full_layers=[10..12])'
    >>> in_words({"name": "full"})
    'full'
    """
    given = dict(record)
    name = given.pop("name")
    numbers = ", ".join(f"{k}={_number(v)}" for k, v in given.items() if v is not None)
    return f"{name}({numbers})" if numbers else str(name)


def _number(value: Any) -> str:
    """A number of a method; three or more neighbours of a list by their first and last."""
    if not isinstance(value, list | tuple):
        return str(value)
    runs: list[list[Any]] = []
    for entry in value:
        if runs and entry == runs[-1][-1] + 1:
            runs[-1].append(entry)
        else:
            runs.append([entry])
    parts = [f"{x[0]}..{x[-1]}" if len(x) > 2 else ", ".join(map(str, x)) for x in runs]
    return f"[{', '.join(parts)}]"


def _module(name: str) -> Any:
    """The module of a method."""
    home = f"{__package__}.{FLAT}" if BESIDE else "longctx.attention."
    return importlib.import_module(home + name)


def rope_config(rope: Rope) -> RopeConfig:
    """The scaling that was asked for; None is `none`.

    Raises:
        UserError: if a mapping has an unknown key.
    """
    if rope is None:
        return RopeConfig()
    if isinstance(rope, RopeConfig):
        return rope
    given = {"name": rope} if isinstance(rope, str) else dict(rope)
    known = [field.name for field in dataclasses.fields(RopeConfig)]
    for key in given:
        if key not in known:
            raise UserError(f"rope.{key} is not one of {', '.join(known)}")
    return RopeConfig(**given)
