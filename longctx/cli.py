"""From a command line to a typed configuration: what the entry points share.

The one home of Hydra beside them. It accepts what launchers append (`--local_rank`), lets
`model=` be a path, and turns every user's mistake into one line and exit code 2.
"""

import dataclasses
import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from hydra_plugins.longctx_jobs import _names as names
from longctx.config import build
from longctx.errors import UserError
from longctx.parallel.mesh import first_to
from longctx.parallel.slurm import ranks

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
CONF = Path(__file__).resolve().parent / "conf"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
UNNAMED = re.compile(r"\[|[-+]?[\d.]+(e-?\d+)?$|(true|false|null)$", re.IGNORECASE)
SWEEP = {"-m", "--multirun", "hydra.mode=MULTIRUN"}


def prepare(arguments: list[str], config_name: str, folder: Path = CONF) -> list[str]:
    """The arguments as Hydra wants them.

    Args:
        arguments: of the command line, without the program's name.
        config_name: the YAML in `folder` to start from.
        folder: where it and its groups are.

    Raises:
        UserError: if `model=` is neither a name in conf/model nor something that can be loaded, if
            a group is given what is no name, or if a sweep cannot be what was meant.
    """
    kept = [a for a in arguments if not a.startswith(("--local_rank", "--local-rank"))]
    sweep = bool(SWEEP.intersection(kept))
    kept = _named(kept, config_name, folder)
    kept = [part for a in kept for part in _model_by_path(a, sweep)]
    return [*kept, *names.name_points(kept)] if sweep else kept


def _named(arguments: list[str], config_name: str, folder: Path) -> list[str]:
    """The arguments, less `GROUP=null` of groups that are empty anyway: Hydra cannot take it.

    Raises:
        UserError: if a group is given what is not the name of a choice and has no such fields.
    """
    kept, groups = list[str](), _groups(config_name, folder)
    groups.pop("model", None)  # a path may look like anything
    given = {key for key, _, value in map(_parts, arguments) if value not in ("", "null")}
    for argument in arguments:
        key, _, value = _parts(argument)
        group, dot, _ = key.partition(".")
        empty = groups.get(group, "") is None
        choices = _choices(group, folder) if group in groups else [value]
        if dot and empty and group not in given:
            raise UserError(f"{argument} needs {group}=NAME too, one of {', '.join(choices)}")
        if not dot and empty and value == "null":
            continue
        mapping = value.startswith("{")
        if not dot and value not in choices and (UNNAMED.match(value) or (empty and mapping)):
            told = f"; give its numbers as {group}.KEY=VALUE" if mapping else ""
            raise UserError(f"{group}={value} is not one of {', '.join(choices)}{told}")
        kept.append(argument)
    return kept


def _parts(argument: str) -> tuple[str, str, str]:
    """Key, `=` and value of an override, whether it adds or sets."""
    return argument.lstrip("+").partition("=")


def _groups(config_name: str, folder: Path) -> dict[str, str | None]:
    """The groups that an entry point composes, and the choice in each by default."""
    found: Any = OmegaConf.to_container(OmegaConf.load(folder / f"{config_name}.yaml"))
    named = [pair for e in found["defaults"] if isinstance(e, dict) for pair in e.items()]
    return {key.removeprefix("optional "): name for key, name in named if "hydra/" not in key}


def _model_by_path(argument: str, sweep: bool) -> list[str]:
    key, _, value = argument.partition("=")
    quoted = value[:1] in ("'", '"') and value[:1] == value[-1:]  # as Hydra allows it
    values = [value[1:-1]] if quoted else value.split(",")
    known = _choices("model")
    paths = [x for x in values if x not in known]
    written = "(" in value and sweep  # choice(...), which only Hydra can read
    if key != "model" or not value or not paths or written or (len(values) > 1 and not sweep):
        return [argument]
    if len(paths) < len(values):
        raise UserError(
            f"{argument}: a sweep takes names of conf/model or paths, not both; "
            f"{next(x for x in values if x in known)} has a path too"
        )
    return ["model=path", "model.path=" + ",".join(f"'{_located(x, known)}'" for x in paths)]


def _located(value: str, known: list[str]) -> str:
    """A model's path, absolute unless it is a name on the hub."""
    exists = Path(value).exists()
    hub = value.count("/") == 1 and not value.startswith((".", "/"))
    if not exists and not hub:
        raise UserError(f"model={value} is neither a path nor one of {', '.join(known)}")
    return str(Path(value).resolve()) if exists else value


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
    with hydra.initialize_config_dir(str(folder), version_base=None):
        config = hydra.compose(config_name, prepare(arguments, config_name, folder))
    return _typed(config, schema)


def run(
    task: Callable[[Any], Any],
    schema: type,
    config_name: str,
    schema_name: str,
    folder: Path = CONF,
) -> None:
    """Composes the command line's configuration and calls `task` with it.

    Never returns normally after a user's mistake: prints `error: ...` and exits with 2.

    Args:
        task: what to do with the typed configuration; what it returns is what a sweep minimises.
        schema: a frozen dataclass.
        config_name: the YAML in `folder` to start from.
        schema_name: how that YAML's defaults list calls the schema.
        folder: where it and its groups are.
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
            return task(_typed(config, schema))

    with mistakes_in_one_line():
        if {"--help", "-h"} & set(sys.argv[1:]):
            print(help_text(config_name, folder))
            return
        os.environ.update(ranks(os.environ))
        sys.argv[1:] = prepare(sys.argv[1:], config_name, folder)
        start()


def help_text(config_name: str, folder: Path = CONF) -> str:
    """The help of an entry point, with the choices of the groups that it composes.

    Not Hydra's own: that needs a full command line, and lists every folder below conf/.

    Args:
        config_name: the YAML in `folder` to start from; its `hydra.help.template` is the text.
        folder: where it and its groups are.
    """
    found: Any = OmegaConf.load(folder / f"{config_name}.yaml")
    groups = _groups(config_name, folder)
    lines = [f"{group}: {', '.join(_choices(group, folder))}\n" for group in groups]
    return str(found.hydra.help.template).replace("$APP_CONFIG_GROUPS", "".join(lines)).rstrip()


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """Ends the process with 2 and one line if the body raises something the user can fix."""
    try:
        yield
    except BrokenPipeError:  # `... | head` has read enough
        os._exit(1)
    except (UserError, HydraException, OmegaConfBaseException, OSError) as error:
        if (
            isinstance(error, OSError)
            and not isinstance(error, HydraException)  # a missing choice is both
            and error.errno not in FULL_DISK
        ):
            raise
        line = _one_line(error)
        if first_to(f"report {line}"):
            sys.stdout.flush()
            print(f"error: {line}", file=sys.stderr, flush=True)
        os._exit(2)  # a rank must not wait for others in some library's exit handler


def _register(schema: type, schema_name: str) -> None:
    ConfigStore.instance().store(name=schema_name, node=_thawed(schema))


def _typed(config: DictConfig, schema: type[T]) -> T:
    values: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    return build(schema, values, "the configuration")


def _thawed(kind: Any) -> type:
    """A twin of a frozen dataclass that OmegaConf may merge into; its parts too."""
    parts: list[Any] = []
    hints = get_type_hints(kind)
    for f in dataclasses.fields(kind):
        hint = _thawed(hints[f.name]) if dataclasses.is_dataclass(hints[f.name]) else hints[f.name]
        parts.append((f.name, hint, dataclasses.field(**_default(f, hint))))
    return dataclasses.make_dataclass(kind.__name__, parts)


def _default(of: "dataclasses.Field[Any]", hint: Any) -> dict[str, Any]:
    """A field's default as `dataclasses.field` takes it; that of a part is its thawed twin."""
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


def _one_line(error: Exception) -> str:
    """The sentence of an error that may have many lines."""
    cause = error.__cause__
    if isinstance(error, MissingConfigException):
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={name} is not one of {', '.join(error.options or [])}"
    if isinstance(error, OverrideParseException):
        return f"{error.override} cannot be read as KEY=VALUE (quote special characters)"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no default: give {error.full_key}=VALUE"
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return _unknown_key(cause)
    if group_asked := re.match(r"You must specify '(\w+)'", str(error)):
        group = group_asked[1]
        return f"{group}= is missing: give one of {', '.join(_choices(group))}"
    text = str(cause if isinstance(cause, UserError) else error)
    if isinstance(cause, ValidationError):
        text = f"{text.removeprefix('Error merging override ')}: {str(cause).splitlines()[0]}"
    lines = [" ".join(x.split()) for x in text.splitlines()]
    lines = [x for x in lines if x and not x.startswith(("object_type=", "reference_type="))]
    return "; ".join(lines)


def _unknown_key(error: ConfigAttributeError | ConfigKeyError) -> str:
    """The key that does not exist, beside those that do."""
    group = str(error.full_key).rpartition(".")[0]
    known = sorted(str(key) for key in error.parent_node or () if key != "hydra")
    line = f"{error.full_key} is not a setting: {group or 'there'} has {', '.join(known) or 'none'}"
    free = error.parent_node is not None and OmegaConf.get_type(error.parent_node) is dict
    return f"{line}; +{error.full_key}=VALUE adds it" if group and free else line


# With the module, so that they are there too where a scheduler's job unpickles a task.
OmegaConf.register_new_resolver("root", lambda: str(ROOT), replace=True)
OmegaConf.register_new_resolver("point", names.point_name, replace=True)
OmegaConf.register_new_resolver("stem", lambda path: Path(path).stem, replace=True)


def _choices(group: str, folder: Path = CONF) -> list[str]:
    """The names in conf/GROUP."""
    return sorted(p.stem for p in (folder / group).glob("*.yaml"))
