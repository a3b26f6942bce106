import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest

from longctx.attention.full import Full
from longctx.errors import UserError
from longctx.models import choose
from longctx.models.choose import attention_method


@pytest.mark.parametrize(
    ("method", "key", "value", "kind"),
    [
        ("dca", "chunk_len", "abc", "a whole number"),
        ("dca", "chunk_len", 1.5, "a whole number"),
        ("dca", "chunk_len", True, "a whole number"),
        ("dca", "chunk_len", {"a": 1}, "a whole number"),
        ("dca", "length_temperature", "x", "a number"),
        ("dca", "preset", 3, "a name"),
        ("lm_infinite", "first", None, "a whole number"),
        ("longgen_blocks", "heads_share", 1, "true or false"),
        ("longgen_window", "full_layers", [1.5], "a name or a list of whole numbers"),
    ],
)
def test_a_number_of_another_type_is_named(method, key, value, kind):
    with pytest.raises(UserError) as caught:
        attention_method({"name": method, key: value})
    assert str(caught.value) == f"attention.{key}={value!r} must be {kind}"


def test_numbers_are_taken():
    assert attention_method({"name": "dca", "length_temperature": 1}).length_temperature == 1
    assert attention_method({"name": "dca", "chunk_len": None}).chunk_len is None
    assert attention_method({"name": "longgen_window", "full_layers": [0, 2]}).full_layers


@dataclass(frozen=True)
class Kinds(Full):
    """A method with numbers of every type."""

    heads: Sequence[Sequence[int]] = ()
    layers: Sequence[int] | None = None
    scales: Mapping[str, float] | None = None
    names: Sequence[str] = ()
    path: str | Sequence[Sequence[float]] = ""


@pytest.fixture
def kinds(monkeypatch):
    monkeypatch.setattr(choose, "method_class", lambda name: Kinds)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("heads", []), ("heads", [[]]), ("heads", [[0, 1], [], [2]]), ("heads", ((0,), (1,))),
        ("layers", None), ("layers", []), ("layers", [3]), ("layers", (1, 2)),
        ("scales", None), ("scales", {}), ("scales", {"a": 1, "b": 0.5}),
        ("names", []), ("names", ["a", "b"]),
        ("path", "heads.json"), ("path", [[0.5, 1], []]),
    ],
)  # fmt: skip
def test_lists_and_mappings_are_taken(kinds, key, value):
    assert getattr(attention_method({"name": "kinds", key: value}), key) == value


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("heads", 1, "a list of lists of whole numbers"),
        ("heads", [1], "a list of lists of whole numbers"),
        ("heads", [[1.5]], "a list of lists of whole numbers"),
        ("heads", [["a"]], "a list of lists of whole numbers"),
        ("heads", "ab", "a list of lists of whole numbers"),
        ("heads", None, "a list of lists of whole numbers"),
        ("heads", {"a": [1]}, "a list of lists of whole numbers"),
        ("layers", 1, "a list of whole numbers"),
        ("layers", [True], "a list of whole numbers"),
        ("layers", [[1]], "a list of whole numbers"),
        ("scales", [1], "a mapping of names to numbers"),
        ("scales", {"a": "b"}, "a mapping of names to numbers"),
        ("scales", {1: 2}, "a mapping of names to numbers"),
        ("names", [1], "a list of names"),
        ("path", 3, "a name or a list of lists of numbers"),
    ],
)
def test_lists_and_mappings_of_something_else_are_named(kinds, key, value, kind):
    with pytest.raises(UserError) as caught:
        attention_method({"name": "kinds", key: value})
    assert str(caught.value) == f"attention.{key}={value!r} must be {kind}"


def test_an_unknown_method_or_number_is_named():
    with pytest.raises(UserError, match=r"attention.name=None is not one of .*full"):
        attention_method({})
    with pytest.raises(UserError, match=r"attention.name='method' is not one of"):
        attention_method("method")
    with pytest.raises(UserError, match=r"attention.sink is not a number of 'full': it has none"):
        attention_method({"name": "full", "sink": 1})


@pytest.mark.parametrize(
    ("source", "has"),
    [
        ("X = 1", "none"),
        ("from longctx.attention.full import Full", "none"),
        ("from longctx.attention.method import Method\nclass A(Method): pass", "A"),
        ("from longctx.attention.full import Full\nclass A(Full): pass\nclass B(Full): pass",
         "A, B"),
    ],
)  # fmt: skip
def test_a_file_without_one_method_is_named(source, has, monkeypatch):
    module = types.ModuleType("longctx.attention.mine")
    exec(source, module.__dict__)
    monkeypatch.setitem(sys.modules, "longctx.attention.mine", module)
    monkeypatch.setattr(choose, "attention_methods", lambda: ["mine"])
    with pytest.raises(UserError, match=f"attention/mine.py must hold one subclass .* has {has}$"):
        attention_method("mine")
