"""Which class a model and its configuration have, by their attention.

With transformers' own attention they are stock classes. With another one they are subclasses that
behave the same and save differently: the configuration gets a `model_type` of its own and is saved
with code, so that no reader takes the checkpoint for a stock one and silently uses full attention.
Costs two small classes per architecture.
"""

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from longctx.errors import UserError
from longctx.models.export import remote
from longctx.models.export.model_types import MODEL_TYPE, OWN
from longctx.models.export.restore import BASE, RECORD, Restored, recorded

MAIN = "modeling_longctx"  # file of the classes in a checkpoint
SOURCE = '''"""{stock} with the attention {attention!r}."""

{imports}


class {config}({stock_config}):
    model_type = "{model_type}"


class {model}({bases}):
    config_class = {config}


METHOD = {method}  # imported, so that transformers copies its file with this one
'''


class _Saving:
    """Mixed in before a stock configuration class: saves the code that its model needs."""

    stock: type[PreTrainedConfig]

    def save_pretrained(self, save_directory: Any, *args: Any, **named: Any) -> None:
        """As the stock configuration does; the code and where it is beside it."""
        names, home = _names(self.stock), Restored.__module__
        names["bases"] = f"Restored, {names['stock']}"
        both = f"{names['stock_config']}, {names['stock']}"
        names["imports"] = f"from transformers import {both}\n\n{_import(home, 'Restored')}"
        setattr(self, BASE, self.stock.model_type)
        _write(self, self, Path(save_directory), names, home, "AutoModelForCausalLM")
        super().save_pretrained(save_directory, *args, **named)  # type: ignore[misc]


def save_own_code(model: PreTrainedModel, directory: Path) -> None:
    """Beside a model that this package has a class for, the code of that class; else nothing.

    Args:
        model: to be saved behind this, since its configuration gets to know where the code is.
        directory: of the model.
    """
    config: Any = model.config
    if (own := OWN.get(config.model_type)) is None:
        return
    home, stock_config, stock = own.module, own.config, own.model
    names = {"stock_config": stock_config, "stock": stock, "bases": stock}
    names |= {"config": f"Longctx{stock_config}", "model": f"Longctx{stock}"}
    names["imports"] = _import(home, f"{stock_config}, {stock}")
    _write(config, getattr(config, "decoder_config", None), directory, names, home, own.auto)


def _write(
    config: Any, decoder: Any, directory: Path, names: dict[str, str], home: str, auto: str
) -> None:
    """Writes a module with the classes in `names`, and what it needs; notes it in `config`."""
    config.auto_map = {
        "AutoConfig": f"{MAIN}.{names['config']}",
        auto: f"{MAIN}.{names['model']}",
    }
    method = type(recorded(decoder))
    directory.mkdir(parents=True, exist_ok=True)
    names |= {"method": method.__name__, "attention": recorded(decoder).name}
    names["imports"] += "\n" + _import(method.__module__, method.__name__)
    remote.write_code(directory, (home, method.__module__))
    source = SOURCE.format(**names, model_type=type(config).model_type)
    (directory / f"{MAIN}.py").write_text(remote.header(MAIN) + source, encoding="utf-8")


def _import(module: str, names: str) -> str:
    """A line of a file beside the checkpoint."""
    return f"from .{remote.flat(module)} import {names}"


def _names(stock: type[PreTrainedConfig]) -> dict[str, str]:
    """What stock classes are called, and what their subclasses are."""
    model = _stock_model(stock).__name__
    config = stock.__name__
    return {
        "stock_config": config,
        "stock": model,
        "config": f"Longctx{config}",
        "model": f"Longctx{model}",
    }


def _stock_model(stock: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """The stock decoder of a stock configuration."""
    found: Any = AutoModelForCausalLM._model_mapping[stock]
    decoder: type[PreTrainedModel] = found
    return decoder


@cache
def _classes(stock: Any) -> tuple[type[Any], type[Any]]:
    """The subclasses of a stock configuration and of its decoder, known to AutoModelForCausalLM."""
    names, base = _names(stock), _stock_model(stock)
    here = {"__module__": __name__, "stock": stock}
    config: Any = type(names["config"], (_Saving, stock), {**here, "model_type": MODEL_TYPE})
    own = {"__module__": __name__, "stock": base, "config_class": config}
    model: Any = type(names["model"], (Restored, base), own)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
    return config, model


def config_class(values: dict[str, Any]) -> Any:
    """The configuration class of a checkpoint whose `model_type` is ours; its model is registered.

    Args:
        values: its config.json.

    Raises:
        UserError: if transformers does not know the decoder.
    """
    if (own := OWN.get(values["model_type"])) is not None:
        module = import_module(own.module)
        config = getattr(module, own.config)
        auto: Any = getattr(transformers, own.auto)
        auto.register(config, getattr(module, own.model), exist_ok=True)
        return config
    base = str(values.get(BASE))
    # Its `get` finds nothing.
    stock: Any = CONFIG_MAPPING[base] if base in CONFIG_MAPPING else None  # noqa: SIM401
    if stock not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"{BASE}={base!r} is not a decoder that this transformers knows")
    return _classes(stock)[0]


def make_stock(config: PreTrainedConfig) -> None:
    """Gives a configuration its stock class; what it records stays.

    Raises:
        UserError: if it was read with the code of its checkpoint.
    """
    if type(config).model_type == MODEL_TYPE and not isinstance(config, _Saving):
        raise UserError(
            f"{type(config).__name__} was loaded with trust_remote_code: "
            "use longctx.load_model(path), which needs no code from the checkpoint"
        )
    config.__class__ = getattr(type(config), "stock", type(config))
    for key in (BASE, "auto_map", "model_type"):  # the class has the right model_type
        config.__dict__.pop(key, None)


def fit_class(model: PreTrainedModel) -> None:
    """Gives a model and its configuration the classes that go with its attention.

    Args:
        model: with its attention set; changed in place.
    """
    config: Any = model.config
    make_stock(config)
    plain = getattr(type(model), "stock", type(model))
    if plain is _stock_model(type(config)):  # else nothing that AutoModelForCausalLM reads
        model.__class__ = plain
        if hasattr(config, RECORD):
            stock: Any = type(config)
            config.__class__, model.__class__ = _classes(stock)
