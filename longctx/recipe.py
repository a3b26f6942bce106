"""The recipe contract: a few functions, and all that the trainer knows of a method.

A recipe is a module with a `RECIPE`. `docs/how-to/recipe.md` writes one.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from longctx.batch import Batch
from longctx.config import RunConfig
from longctx.config.typed import from_user
from longctx.errors import UserError

T = TypeVar("T")


class Loader(Protocol):
    """`batch = f(seed, step, dp_rank, dp_size)`: no hidden state, one integer resumes it."""

    def step(self, step: int, dp_rank: int, dp_size: int) -> list[Batch]:
        """This rank's micro-batches of optimizer step `step`."""
        ...

    @property
    def identity(self) -> dict[str, str]:
        """Named parts that decide the tokens and their order; a resumed run must have the same."""
        ...

    def describe(self, samples: int) -> list[str]:
        """What a run over `samples` rows will read and how often, in lines; warnings among them."""
        ...


@dataclass(frozen=True)
class Data:
    """Training rows, and held-out rows (None: no periodic evaluation)."""

    train: Loader
    held_out: Loader | None


@dataclass(frozen=True)
class NoSettings:
    """A recipe whose numbers are those that every run has."""


def same_size(run: RunConfig, seq_len: int, vocab_size: int) -> Mapping[str, Any]:
    """No setting of the recipe depends on the size of a row or of the vocabulary."""
    return {}


@dataclass(frozen=True)
class Recipe:
    """How to build, feed, score and select.

    Every function is given the run, so nothing has to be kept on the model or the loader.

    Args:
        build_model: the model of a run, weights loaded, on CPU.
        build_data: its loaders. `longctx.data.loader.packed` and
            `longctx.data.context_loader.windowed` make them; both take `change=`, a function of
            (row, sample number) that gives the row to train on: masked labels, hidden tokens, a
            stored teacher.
        loss: `(run, model, batch) -> (sum, count)`, the summed loss over scored tokens and their
            number, both scalars; the trainer divides by the global count.
        trainable: the parameters to train, by name; all others are frozen.
        sketch: the model's shapes on the meta device, no weight read, for plans.
        settings: a frozen dataclass of the recipe's own settings, `settings:` in its YAML; read
            them with `settings_of(run, CLASS)`.
        tiny: `(run, seq_len, vocab_size) ->` the fields of the run that the recipe brings along,
            small enough for rows of `seq_len` tokens and a decoder of random weights that knows
            `vocab_size` of them; the parity certificate and the tests train on that.
        reads_weights: whether `build_model` reads the weights of `model.path`.
        distils: whether the loss asks a teacher, which `longctx.commands.teacher` can store.
    """

    build_model: Callable[[RunConfig], nn.Module]
    build_data: Callable[[RunConfig], Data]
    loss: Callable[[RunConfig, nn.Module, Batch], tuple[Tensor, Tensor]]
    trainable: Callable[[nn.Module], dict[str, nn.Parameter]]
    sketch: Callable[[RunConfig], nn.Module]
    settings: type[Any] = NoSettings
    tiny: Callable[[RunConfig, int, int], Mapping[str, Any]] = same_size
    reads_weights: bool = True
    distils: bool = False


def settings_of(run: RunConfig, kind: type[T]) -> T:
    """The recipe's own settings of a run, typed.

    Args:
        run: with `settings`, a mapping.
        kind: the recipe's frozen dataclass of them.

    Raises:
        UserError: if one is unknown, missing or of another type.
    """
    return from_user(kind, run.settings, "settings", f"recipe {run.name}")


def find_recipe(builder: str) -> Recipe:
    """The RECIPE of a module: `recipes.NAME` is one of longctx's own, others are imported as named.

    Raises:
        UserError: if there is no such module, or it holds no RECIPE.
    """
    name = f"longctx.{builder}" if builder.startswith("recipes.") else builder
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise UserError(f"builder={builder}: there is no such module") from None
    recipe = getattr(module, "RECIPE", None)
    if not isinstance(recipe, Recipe):
        raise UserError(f"builder={builder}: the module holds no RECIPE")
    return recipe
