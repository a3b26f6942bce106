"""The recipe contract: five functions, and all that the trainer knows of a method."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from longctx.batch import Batch
from longctx.config import RunConfig
from longctx.errors import UserError


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
class Recipe:
    """How to build, feed, score and select.

    Args:
        build_model: the model of a run, weights loaded, on CPU.
        build_data: its loaders.
        loss: `(model, batch) -> (sum, count)`, the summed loss over scored tokens and their number,
            both scalars; the trainer divides by the global count.
        trainable: the parameters to train, by name; all others are frozen.
        sketch: the model's shapes on the meta device, no weight read, for plans.
        reads_weights: whether `build_model` reads those of `model.path`.
    """

    build_model: Callable[[RunConfig], nn.Module]
    build_data: Callable[[RunConfig], Data]
    loss: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]
    trainable: Callable[[nn.Module], dict[str, nn.Parameter]]
    sketch: Callable[[RunConfig], nn.Module]
    reads_weights: bool = True


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
