"""Composes a configuration with Hydra, and starts a command with it.

The home of Hydra in this package, with the other files of `longctx.cli`.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict

from hydra_plugins.longctx_jobs import _names as names
from longctx.cli import families, numbers, places
from longctx.cli.arguments import groups, prepare
from longctx.cli.mistakes import mistakes_in_one_line
from longctx.cli.places import CONF
from longctx.config import RunConfig, build
from longctx.parallel.slurm import ranks

T = TypeVar("T")
OPEN = dict[str, Any]
Words = Mapping[str, Callable[[], str]]


def compose(
    arguments: list[str], schema: type[T], config_name: str, schema_name: str, folder: Path = CONF
) -> T:
    """The typed configuration of a command line, without running anything.

    Args:
        arguments: overrides, as on the command line.
        schema: a frozen dataclass.
        config_name: the YAML in `folder` to start from.
        schema_name: how that YAML's defaults list calls the schema.
        folder: where it and its groups are.

    Raises:
        UserError: if a value is not allowed.
        HydraException, OmegaConfBaseException: if a choice or key does not exist.
    """
    _register(schema, schema_name)
    given = prepare(arguments, config_name, folder)
    with hydra.initialize_config_dir(str(folder), version_base=None):
        config = hydra.compose(config_name, given, return_hydra_config=True)
    with open_dict(config):
        choices = config.pop("hydra").runtime.choices
    return _typed(config, schema, choices, given)[0]


def run(
    task: Callable[[Any], Any],
    schema: type,
    config_name: str,
    schema_name: str,
    folder: Path = CONF,
    words: Words | None = None,
) -> None:
    """Composes the command line's configuration and calls `task` with it.

    Never returns normally after a user's mistake: prints `error: ...` and exits with 2.

    Args:
        task: what to do with the typed configuration; what it returns is what a sweep minimises.
        schema: a frozen dataclass.
        config_name: the YAML in `folder` to start from.
        schema_name: how that YAML's defaults list calls the schema.
        folder: where it and its groups are.
        words: what stands for a `$NAME` in the help.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through; they are worded below
    _register(schema, schema_name)

    @hydra.main(version_base=None, config_path=str(folder), config_name=config_name)
    def start(config: DictConfig) -> Any:
        # Here and not only around Hydra, which would print all overrides before the one line.
        with mistakes_in_one_line():
            os.environ.update(ranks(os.environ))
            hydra_config = HydraConfig.get()
            if hydra_config.mode == RunMode.MULTIRUN and "run_dir" in config:
                config.run_dir = hydra_config.runtime.output_dir
            told = hydra_config.runtime.choices, list(hydra_config.overrides.task)
            settings: Any
            settings, line = _typed(config, schema, *told)
            numbers.say(line)
            if hasattr(settings, "model"):
                places.require_model(settings.model)
            return task(settings)

    with mistakes_in_one_line():
        if {"--help", "-h"} & set(sys.argv[1:]):
            places.use(places.split(sys.argv[1:])[1])
            print(help_text(config_name, folder, words))
            return
        os.environ.update(ranks(os.environ))
        sys.argv[1:] = prepare(sys.argv[1:], config_name, folder)
        start()


def help_text(config_name: str, folder: Path = CONF, words: Words | None = None) -> str:
    """The help of an entry point, with the choices of the groups that it composes.

    Not Hydra's own: that needs a full command line, and lists every folder below conf/.

    Args:
        config_name: the YAML in `folder` to start from; its `hydra.help.template` is the text.
        folder: where it and its groups are.
        words: what stands for a `$NAME` in it.
    """
    found: Any = OmegaConf.load(folder / f"{config_name}.yaml")
    known = {group: places.choices(group, folder) for group in groups(config_name, folder)}
    lines = [f"{group}: {', '.join(names)}\n" for group, names in known.items() if names]
    text = str(found.hydra.help.template).replace("$APP_CONFIG_GROUPS", "".join(lines))
    for name, made in (words or {}).items():
        text = text.replace(f"${name}", made())
    return text.rstrip()


def _register(schema: type, schema_name: str) -> None:
    more = numbers.Composing if schema is RunConfig else None
    ConfigStore.instance().store(name=schema_name, node=_thawed(schema, more))


def _typed(
    config: DictConfig, schema: type[T], choices: Mapping[str, Any], given: Sequence[str]
) -> tuple[T, str | None]:
    """The settings, and what a user must know about them, in one line."""
    composing = numbers.settle(config, given)
    values: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    settings = build(schema, values, "the configuration")
    if schema is not RunConfig:
        return settings, None
    return settings, numbers.require_sized(composing, settings, choices, given)


def _thawed(kind: Any, more: Any = None) -> type:
    """A twin of a frozen dataclass that OmegaConf may merge into; its parts too.

    Args:
        kind: the dataclass.
        more: another one, whose fields it has too.
    """
    parts: list[Any] = []
    hints = {**get_type_hints(kind), **(get_type_hints(more) if more else {})}
    for f in (*dataclasses.fields(kind), *(dataclasses.fields(more) if more else ())):
        hint = _thawed(hints[f.name]) if dataclasses.is_dataclass(hints[f.name]) else hints[f.name]
        parts.append((f.name, hint, dataclasses.field(**_default(f, hint))))
    return dataclasses.make_dataclass(kind.__name__, parts)


def _default(of: "dataclasses.Field[Any]", hint: Any) -> dict[str, Any]:
    """A field's default as `dataclasses.field` takes it; that of a part is its thawed twin."""
    if hint == OPEN or hint == OPEN | None:  # takes any key; who uses it knows which there are
        content = {} if of.default is dataclasses.MISSING else of.default
        return {"default_factory": lambda: DictConfig(content, flags={"struct": False})}
    if of.default_factory is dataclasses.MISSING:
        if of.default is not dataclasses.MISSING:
            return {"default": of.default}
        # A part is there with its fields missing, so that a sweep over recipes takes train.x=1.
        return {"default_factory": hint} if dataclasses.is_dataclass(hint) else {"default": MISSING}
    value = of.default_factory()
    if not dataclasses.is_dataclass(value):
        return {"default_factory": of.default_factory}
    parts = dataclasses.asdict(value)  # type: ignore[arg-type]
    return {"default_factory": lambda: hint(**parts)}


# With the module, so that they are there too where a scheduler's job unpickles a task.
OmegaConf.register_new_resolver("root", lambda: str(places.root()), replace=True)
OmegaConf.register_new_resolver("family", families.of_model, replace=True)
OmegaConf.register_new_resolver("point", names.point_name, replace=True)
OmegaConf.register_new_resolver("stem", families.model_name, replace=True)
