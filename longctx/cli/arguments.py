"""From the arguments that a user or a launcher gives to those that Hydra takes.

Launchers append `--local_rank`; `model=` may be a path; an empty group may be given as null.
"""

import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from hydra_plugins.longctx_jobs import _names as names
from longctx.cli import families, places
from longctx.cli.places import CONF, choices
from longctx.errors import UserError

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
            a group is given what is no name, if a folder of choices does not exist, or if a sweep
            cannot be what was meant.
    """
    kept, more = places.split(arguments)
    places.use(more)
    families.register()
    kept = [a for a in kept if not a.startswith(("--local_rank", "--local-rank"))]
    sweep = bool(SWEEP.intersection(kept))
    kept = _named(kept, config_name, folder)
    kept = [part for a in kept for part in _model_by_path(a, sweep, choices("model"))]
    if "family" in groups(config_name, folder):
        kept += families.of_path(kept)
    if more:
        kept.append(f"hydra.searchpath=[{','.join(f'file://{place}' for place in more)}]")
    return [*kept, *names.name_points(kept)] if sweep else kept


def _named(arguments: list[str], config_name: str, folder: Path) -> list[str]:
    """The arguments, less `GROUP=null` of groups that are empty anyway: Hydra cannot take it.

    Raises:
        UserError: if a group is given what is not the name of a choice and has no such fields.
    """
    kept, known_groups = list[str](), groups(config_name, folder)
    known_groups.pop("model", None)  # a path may look like anything
    known_groups.pop("family", None)  # no files, families.py knows them
    given = {key for key, _, value in map(parts, arguments) if value not in ("", "null")}
    for argument in arguments:
        key, _, value = parts(argument)
        group, dot, _ = key.partition(".")
        empty = known_groups.get(group, "") is None
        known = choices(group, folder) if group in known_groups else [value]
        if dot and empty and group not in given:
            raise UserError(f"{argument} needs {group}=NAME too, one of {', '.join(known)}")
        if not dot and empty and value == "null":
            continue
        mapping = value.startswith("{")
        if not dot and value not in known and (UNNAMED.match(value) or (empty and mapping)):
            told = f"; give its numbers as {group}.KEY=VALUE" if mapping else ""
            raise UserError(f"{group}={value} is not one of {', '.join(known)}{told}")
        kept.append(argument)
    return kept


def parts(argument: str) -> tuple[str, str, str]:
    """Key, `=` and value of an override, whether it adds or sets."""
    return argument.lstrip("+").partition("=")


def groups(config_name: str, folder: Path = CONF) -> dict[str, str | None]:
    """The groups that a command composes, and the choice in each by default.

    Args:
        config_name: the YAML in `folder` to start from.
        folder: where it and its groups are.
    """
    found: Any = OmegaConf.to_container(OmegaConf.load(folder / f"{config_name}.yaml"))
    named = [pair for e in found["defaults"] if isinstance(e, dict) for pair in e.items()]
    return {key.removeprefix("optional "): name for key, name in named if "hydra/" not in key}


def _model_by_path(argument: str, sweep: bool, known: list[str]) -> list[str]:
    key, _, value = argument.partition("=")
    quoted = value[:1] in ("'", '"') and value[:1] == value[-1:]  # as Hydra allows it
    values = [value[1:-1]] if quoted else value.split(",")
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
    """A model's path, absolute unless it is a name on the hub; of a run's directory its export."""
    path = Path(value)
    hub = value.count("/") == 1 and not value.startswith((".", "/"))
    if not path.exists() and not hub:
        raise UserError(f"model={value} is neither a path nor one of {', '.join(known)}")
    if not path.exists():
        return value
    if path.is_dir() and not (path / "config.json").exists():
        if (path / families.EXPORT / "config.json").is_file():
            path = path / families.EXPORT
        elif (path / families.RUN).is_file():
            raise UserError(
                f"model={value} is a run without an export: it writes {value}/{families.EXPORT} "
                "when it ends; longctx export CHECKPOINT DIR exports an earlier checkpoint"
            )
    return str(path.resolve())
