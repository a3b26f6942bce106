"""Settings: every key of a YAML file in `conf/` is a field of a dataclass in `longctx/config`."""

import dataclasses
from typing import Any

import yaml

from longctx.cli.numbers import Composing
from longctx.config import RunConfig
from longctx.models.choose import attention_methods, method_class
from tests.helpers.tree import found, text

HYDRA_KEYS = {"defaults", "hydra"}
GROUPS = {
    field.name: field.type
    for field in dataclasses.fields(RunConfig)
    if isinstance(field.type, type)
    and dataclasses.is_dataclass(field.type)
    and found(f"conf/{field.name}/*.yaml")
}


def strays(values: dict[str, Any], schema: type[Any], where: str = "") -> list[str]:
    """Dotted keys of `values` that are no field of the dataclass `schema`."""
    known = {field.name: field.type for field in dataclasses.fields(schema)}
    out = []
    for key, value in values.items():
        if key not in known:
            out.append(where + key)
        elif isinstance(known[key], type) and dataclasses.is_dataclass(known[key]):
            out += strays(value or {}, known[key], f"{where}{key}.")
    return out


def settings(path: str) -> dict[str, Any]:
    """What a YAML file sets, without Hydra's own keys."""
    loaded = yaml.safe_load(text(path)) or {}
    return {key: value for key, value in loaded.items() if key not in HYDRA_KEYS}


def test_every_key_of_a_group_is_a_field():
    assert {"model", "rope", "encoder", "data", "optim", "parallel"} <= GROUPS.keys()
    unknown = {
        path: found_strays
        for name, schema in GROUPS.items()
        for path in found(f"conf/{name}/*.yaml")
        if (found_strays := strays(settings(path), schema))
    }
    assert unknown == {}


def test_every_key_of_a_run_is_a_field():
    files = found("conf/train.yaml") + found("conf/recipe*/**/*.yaml")
    assert len(files) > 10
    shaping = {field.name for field in dataclasses.fields(Composing)}
    keys = {p: {k: v for k, v in settings(p).items() if k not in shaping} for p in files}
    unknown = {p: s for p, values in keys.items() if (s := strays(values, RunConfig))}
    assert unknown == {}


def test_a_stray_key_is_seen():
    values = {"seed": 1, "optim": {"lr": 1.0, "learning_rate": 1.0}, "sed": 1}
    assert strays(values, RunConfig) == ["optim.learning_rate", "sed"]


def repeated(values: dict[str, Any], schema: type[Any], where: str = "") -> list[str]:
    """Dotted keys of `values` that say what the dataclass `schema` has as its default."""
    out = []
    for field in dataclasses.fields(schema):
        if field.name not in values or field.name == "name":
            continue
        value = values[field.name]
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            out += repeated(value or {}, field.type, f"{where}{field.name}.")
        elif value == field.default and type(value) is type(field.default):
            out.append(where + field.name)
    return out


def test_a_number_has_one_home():
    """A choice does not say again what is the default of its dataclass; nor does a method's."""
    assert repeated({"wandb": {"mode": "x"}, "force": False}, RunConfig) == ["force"]
    schemas = [
        (path, schema) for name, schema in GROUPS.items() for path in found(f"conf/{name}/*")
    ]
    schemas += [(f"conf/attention/{x}.yaml", method_class(x)) for x in attention_methods()]
    schemas += [("conf/train.yaml", RunConfig)]
    twice = {path: keys for path, kind in schemas if (keys := repeated(settings(path), kind))}
    assert twice == {}
