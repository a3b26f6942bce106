"""Nested dictionaries to settings, and the settings of the data."""

import dataclasses

import pytest

from longctx.config import DataConfig, build
from longctx.errors import UserError


@dataclasses.dataclass(frozen=True)
class Inner:
    a: int
    later: int = 7


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    free: dict


def test_parts_become_dataclasses():
    built = build(Outer, {"inner": {"a": 1, "later": 2}, "free": {"x": 1}}, "here")
    assert built == Outer(Inner(1, 2), {"x": 1})
    assert build(Outer, dataclasses.asdict(built), "here") == built


def test_what_an_earlier_version_did_not_have_keeps_its_default():
    assert build(Outer, {"inner": {"a": 1}, "free": {}}, "here").inner.later == 7


@pytest.mark.parametrize(
    ("values", "odd"),
    [
        ({"inner": {"later": 1}, "free": {}}, "here.inner was .*: a"),
        ({"inner": {"a": 1, "b": 2}, "free": {}}, "here.inner was .*: b"),
        ({"inner": {"a": 1}}, "here was written by another version of longctx: free"),
        ({"inner": {"a": 1}, "free": {}, "x": 1, "w": 2}, "here was .*: w, x"),
    ],
)
def test_missing_and_unknown_keys_are_named(values, odd):
    with pytest.raises(UserError, match=f"{odd}$"):
        build(Outer, values, "here")


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (
            {"weights": [1.0]},
            "data.weights has 1 numbers for 2 directories in data.store: give one for each",
        ),
        ({"weights": [1.0, 0.0]}, "data.weights[1]=0.0 must be above 0"),
        ({"weights": [-1.0, 1.0]}, "data.weights[0]=-1.0 must be above 0"),
        ({"weights": [float("nan"), 1.0]}, "data.weights[0]=nan must be above 0"),
        ({"weights": [1.0, float("inf")]}, "data.weights[1]=inf must be finite"),
        ({"long_tokens": 0}, "data.long_tokens=0 must be above 0"),
        ({"short_keep": 1.5}, "data.short_keep=1.5 must be between 0 and 1"),
        ({"short_keep": float("nan")}, "data.short_keep=nan must be between 0 and 1"),
        ({"prefetch": -1}, "data.prefetch=-1 must not be below 0"),
        ({"packing": "x"}, "data.packing='x' is not one of concat, best_fit"),
    ],
)
def test_data_settings_that_cannot_be(more, line):
    good = {"store": ["a", "b"], "held_out": [], "seq_len": 8, "packing": "concat"}
    with pytest.raises(UserError) as error:
        DataConfig(**{**good, "mask_documents": False, **more})
    assert str(error.value) == line
