"""Families of models: those that share the numbers a recipe is run with.

Each `conf/model/NAME.yaml` says its `family`. `conf/recipe_model/RECIPE_FAMILY.yaml` holds what a
recipe changes for one. A model given by path has the family that its run recorded, or else `path`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore

from longctx.cli import places

UNKNOWN = "path"  # the family in conf/model/path.yaml
EXPORT, RUN = "hf", "config.yaml"  # in a run's directory


def register() -> None:
    """Makes `family=NAME` a choice for each family that occurs in conf/model."""
    for family in {of_model(model) for model in places.choices("model")}:
        ConfigStore.instance().store(
            name=family, node={"model": {"family": family}}, group="family", package="_global_"
        )


def of_model(model: str, given: str | None = None) -> str:
    """The family of a choice of `model=`.

    Args:
        model: its name.
        given: what `family=` says; it decides.
    """
    return given or str(places.says("model", model, "family") or UNKNOWN)


def of_path(arguments: Sequence[str]) -> list[str]:
    """`family=NAME` for a model given by path whose run recorded its family; else nothing.

    Args:
        arguments: of the command line, as Hydra takes them.
    """
    given = dict(a.lstrip("+").split("=", 1) for a in arguments if "=" in a)
    path = given.get("model.path", "").strip("'\"")
    if "family" in given or given.get("model") != UNKNOWN or not path:
        return []
    try:
        recorded: Any = yaml.safe_load((Path(path).parent / RUN).read_text(encoding="utf-8"))
        model = recorded["model"]
        family = model.get("family") or of_model(model["name"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError):
        return []
    return [] if family == UNKNOWN else [f"family={family}"]


def model_name(path: str) -> str:
    """The short name of a model given by path: of an export, that of its run.

    >>> model_name("/models/Llama-3.1-8B"), model_name("x/tiny.gguf"), model_name("out/pi-lab/hf")
    ('Llama-3.1-8B', 'tiny', 'pi-lab')
    """
    place = Path(path)
    name = place.parent.name if place.name == EXPORT else place.name
    return name.removesuffix(".gguf") or place.name
