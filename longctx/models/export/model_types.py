"""The model types that longctx adds to those of transformers, and where their classes are.

Neither torch nor transformers is imported: `import longctx` reads this table, and the modules in it
are imported when a checkpoint of their type is read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

MODEL_TYPE = "longctx"  # a stock decoder whose attention is not transformers' own


@dataclass(frozen=True)
class OwnType:
    """A model type with classes of this package.

    Args:
        module: dotted name of the module that holds both classes.
        config: name of the configuration class.
        model: name of the model class.
        auto: the class of transformers that reads its checkpoints.
        loader: dotted name of a function with the arguments of `load_model`; it takes a path or a
            built model. None: `load_model` does not read this type.
    """

    module: str
    config: str
    model: str
    auto: str
    loader: str | None = None


OWN = {
    "longctx_cepe": OwnType(
        module="longctx.models.cepe.model",
        config="CepeConfig",
        model="CepeForCausalLM",
        auto="AutoModelForCausalLM",
        loader="longctx.models.cepe.checkpoints.load_cepe",
    ),
    "longctx_encoder": OwnType(
        module="longctx.models.cepe.encoder",
        config="EncoderConfig",
        model="EncoderForMaskedLM",
        auto="AutoModelForMaskedLM",
    ),
}


def loader(model_type: str) -> Callable[..., Any] | None:
    """What reads or changes a model of a type in place of `load_model`; None: nothing does."""
    own = OWN.get(model_type)
    if own is None or own.loader is None:
        return None
    module, _, name = own.loader.rpartition(".")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found
