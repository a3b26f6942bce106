"""From what a user writes (a name, a mapping) to an attention method or a rope, or one clear line.

Costs the import of the attention methods, which need torch only.
"""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from inspect import isabstract
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from longctx.attention.method import FLAT, Method
from longctx.config.rope import RopeConfig
from longctx.errors import UserError

BESIDE = not __name__.startswith("longctx.")  # this file lies beside a checkpoint, with flat names
NO_METHOD = ("method", "ops_")  # how names of other files among them begin

# A method's fields: what one value of a type is called, what several are, and what is one.
KINDS: dict[Any, tuple[str, str, tuple[type, ...]]] = {
    int: ("a whole number", "whole numbers", (int,)),
    float: ("a number", "numbers", (int, float)),
    bool: ("true or false", "trues and falses", (bool,)),
    str: ("a name", "names", (str,)),
}

Attention = str | Mapping[str, Any] | None
Rope = RopeConfig | Mapping[str, Any] | str | None


def attention_methods() -> list[str]:
    """Names of the methods: the files of `longctx/attention/`, or those beside a checkpoint."""
    here = Path(__file__).parent
    files = here.glob(f"{FLAT}*.py") if BESIDE else (here.parent / "attention").glob("[!_]*.py")
    names = (file.stem.removeprefix(FLAT) for file in files)
    return sorted(name for name in names if not name.startswith(NO_METHOD))


def method_class(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        UserError: if there is no such method, or its file holds none or several classes.
    """
    available = attention_methods()
    if name not in available:
        raise UserError(f"attention.name={name!r} is not one of {', '.join(available)}")
    module = importlib.import_module(
        f"{__package__}.{FLAT}{name}" if BESIDE else f"longctx.attention.{name}"
    )
    own = [x for x in vars(module).values() if getattr(x, "__module__", "") == module.__name__]
    found = [x for x in own if isinstance(x, type) and issubclass(x, Method)]
    if len(found) != 1 or not dataclasses.is_dataclass(found[0]) or isabstract(found[0]):
        raise UserError(
            f"longctx/attention/{name}.py must hold one subclass of Method that gives `definition`,"
            f" a frozen dataclass; it has {', '.join(x.__name__ for x in found) or 'none'}"
        )
    return found[0]


def attention_method(attention: str | Mapping[str, Any]) -> Method:
    """The method of that name with its numbers.

    Raises:
        UserError: if the name or one of the numbers is unknown.
    """
    given = {"name": attention} if isinstance(attention, str) else dict(attention)
    name: Any = given.pop("name", None)
    numbers = method_class(name)
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
    if not _fits(hint, value):
        raise UserError(f"{key}={value!r} must be {_words(hint)}")


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value is of a type: one of `KINDS`, None, a list, a mapping, or one of several."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(each, value) for each in inner)
    if origin in (Sequence, list, tuple):
        return isinstance(value, list | tuple) and all(_fits(inner[0], each) for each in value)
    if origin in (Mapping, dict):
        pairs = value.items() if isinstance(value, Mapping) else [(None, None)]
        return all(_fits(inner[0], k) and _fits(inner[1], v) for k, v in pairs)
    if hint in (None, type(None)):
        return value is None
    assert hint in KINDS, f"a number of an attention method cannot be of type {hint}"
    return type(value) in KINDS[hint][2]


def _words(hint: Any, several: bool = False) -> str:
    """What a value of a type is called in a message."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_words(each, several) for each in inner if each is not type(None))
    if origin in (Sequence, list, tuple):
        return f"{'lists' if several else 'a list'} of {_words(inner[0], True)}"
    if origin in (Mapping, dict):
        return (
            f"{'mappings' if several else 'a mapping'} of {_words(inner[0], True)} to "
            f"{_words(inner[1], True)}"
        )
    one, more, _ = KINDS[hint]
    return more if several else one


def in_words(record: Mapping[str, Any]) -> str:
    """A method with its numbers, as a run prints it; runs of layers are `first..last`.

    >>> in_words({"name": "longgen_window", "sink_tokens": 64, "full_layers": [10, 11, 12]})
    'longgen_window(sink_tokens=64, full_layers=[10..12])'
    >>> in_words({"name": "heads", "full": [[0, 1, 2], [], [3, 5]], "names": ["a", "b"]})
    'heads(full=[[0..2], [], [3, 5]], names=[a, b])'
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
        follows = type(entry) is int and runs and type(runs[-1][-1]) is int
        if follows and entry == runs[-1][-1] + 1:
            runs[-1].append(entry)
        else:
            runs.append([entry])
    parts = [f"{x[0]}..{x[-1]}" if len(x) > 2 else ", ".join(map(_number, x)) for x in runs]
    return f"[{', '.join(parts)}]"


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
