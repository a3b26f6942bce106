"""Whose numbers a run takes, settled after Hydra has composed it.

A recipe states numbers for one attention method, or one rope scaling, under `chosen`: they are
taken where that method is chosen, so that another choice needs no deletions. And it says for which
family of models its numbers are meant (`sized_for`): they are not taken silently for another.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, open_dict

from longctx.cli import places
from longctx.cli.families import UNKNOWN
from longctx.errors import UserError

SIZES = ("data.seq_len", "train.batch_rows")  # whoever gives both has sized the run himself


@dataclass(frozen=True)
class Composing:
    """Keys of a recipe that shape the composition of a run and are no settings of it.

    Args:
        sized_for: the family of models that the recipe's numbers are for. None: any.
        chosen: group -> choice -> numbers, taken where the group's `name` is that choice.
    """

    sized_for: str | None = None
    chosen: dict[str, Any] = field(default_factory=dict)


def settle(config: DictConfig, given: Sequence[str]) -> Composing:
    """Takes the keys of `Composing` out of a composed run, and puts the chosen numbers in.

    Args:
        config: as Hydra composed it; is changed.
        given: overrides of the command line, which count more.
    """
    if "chosen" not in config:
        return Composing()
    with open_dict(config):
        composing = Composing(config.pop("sized_for"), dict(config.pop("chosen")))
        typed = keys(given)
        for group, choices in composing.chosen.items():
            numbers = choices.get(config[group].get("name")) or {}
            for key, value in numbers.items():
                if not {group, f"{group}.{key}"} & (typed - groups_given(given)):
                    config[group][key] = value
    return composing


def keys(given: Sequence[str]) -> set[str]:
    """The keys of overrides, whether they set, add or delete."""
    return {argument.lstrip("+~").partition("=")[0] for argument in given}


def groups_given(given: Sequence[str]) -> set[str]:
    """Keys that are given the name of a choice, not a mapping."""
    pairs = (argument.lstrip("+~").partition("=") for argument in given)
    return {key for key, _, value in pairs if "." not in key and not value.startswith("{")}


def require_sized(
    composing: Composing, run: Any, choices: Mapping[str, Any], given: Sequence[str]
) -> str | None:
    """What a user must know about the numbers of a run, in one line; None: nothing.

    Args:
        composing: what its recipe says.
        run: the RunConfig.
        choices: by group.
        given: overrides of the command line.

    Raises:
        UserError: if other recipes have numbers for models of this family, and this one has none.
    """
    family, recipe = run.model.family, choices.get("recipe")
    named = "recipe_model" in keys(given) or choices.get("recipe_model") in places.choices(
        "recipe_model"
    )
    if named or composing.sized_for in (None, family) or set(SIZES) <= keys(given):
        return None
    size = f"{run.train.batch_rows:,} rows of {run.data.seq_len:,} tokens a step"
    told = f"recipe={recipe} has numbers for {composing.sized_for}, {size}"
    known = with_numbers(family)
    if known and family != UNKNOWN:
        raise UserError(
            f"{told}, and none for model={choices.get('model')} (family {family}): give "
            f"{' and '.join(f'{key}=N' for key in SIZES)}, or one of recipe={','.join(known)}"
        )
    which = "an unknown family" if family == UNKNOWN else f"the family {family}"
    return (
        f"note: {told}, and takes them for {run.model.name}, a model of {which}: family=NAME takes "
        f"those of another, {' and '.join(f'{key}=N' for key in SIZES)} your own"
    )


def with_numbers(family: str) -> list[str]:
    """The recipes that have numbers for a family of models."""
    own = places.choices("recipe_model")
    return [
        x
        for x in places.choices("recipe")
        if f"{x}_{family}" in own or places.says("recipe", x, "sized_for") == family
    ]


def say(line: str | None) -> None:
    """Prints a line on stderr, once for all ranks."""
    if line and os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
