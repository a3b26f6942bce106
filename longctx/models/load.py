"""Load or build a decoder with a rope scaling and an attention method.

The model stays the stock transformers class. Rope is set on the configuration before the model is
built, because transformers 5 ignores it afterwards, and the frequencies of the built model are
asserted against `longctx.rope`. Costs one reading of the weights.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from longctx.errors import UserError
from longctx.models import attach
from longctx.models.architecture import config_of
from longctx.models.choose import Attention, Rope, in_words
from longctx.models.configure import configure, native_window
from longctx.models.export.classes import fit_class, make_stock
from longctx.models.export.model_types import loader
from longctx.models.export.restore import RECORD
from longctx.models.files import FAILURES, Dtype, as_dtype, cannot, locate, require_all
from longctx.models.switch import switch


def load_model(
    path_or_model: str | Path | PreTrainedModel,
    attention: Attention = None,
    rope: Rope = None,
    dtype: Dtype = None,
    device: str | torch.device | None = None,
) -> PreTrainedModel:
    """A pretrained decoder, with rope and attention of choice.

    Args:
        path_or_model: a directory, a `.gguf` file (de-quantised), or a hub name; or a transformers
            model, whose attention is switched in place.
        attention: a method's name, or a mapping of `name` and its numbers. None: what the
            checkpoint records, else full attention.
        rope: the scaling. None: the checkpoint's own; that of a built model cannot be changed.
        dtype: `fp32 | bf16` or a torch dtype. None: the checkpoint's own.
        device: where to put it. None: CPU, or where it is.

    Raises:
        UserError: if the path cannot be read, is not a rotary decoder, or a choice does not fit it.
    """
    if isinstance(path_or_model, PreTrainedModel):
        if rope is not None:
            raise UserError("rope= cannot change a model that is built: give it where you load it")
        change: Callable[..., PreTrainedModel] | None = loader(path_or_model.config.model_type)
        if change is not None:
            return change(path_or_model, attention, None, dtype, device)
        return switch(path_or_model, attention, dtype, device)
    path = str(path_or_model)
    where, extra = locate(path)
    try:
        config = AutoConfig.from_pretrained(where, **extra)
    except FAILURES as error:
        raise cannot("read the configuration of", path, error) from error
    read: Callable[..., PreTrainedModel] | None = loader(config.model_type)
    if read is not None:
        return read(path, attention, rope, dtype, device)
    config, expected, method, name = configure(config, attention, rope, path)
    options: dict[str, Any] = {**extra, "dtype": "auto" if dtype is None else as_dtype(dtype)}
    if not extra:
        options["use_safetensors"] = True  # never unpickle
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where, config=config, attn_implementation=name, output_loading_info=True, **options
        )
    except FAILURES as error:
        raise cannot("load the weights of", path, error) from error
    model, info = loaded
    assert isinstance(model, PreTrainedModel)
    require_all(info, path)
    if extra:
        _forget_quantisation(model)
    attach.guard_rotary(model, expected, method)
    fit_class(model)
    if device is not None:
        nn.Module.to(model, device)
    return model


def build_model(
    architecture: Mapping[str, Any],
    attention: Attention = None,
    rope: Rope = None,
    dtype: str | torch.dtype = "fp32",
    seed: int = 0,
    meta: bool = False,
) -> PreTrainedModel:
    """A decoder from random weights; the same seed gives the same weights in fp32 and bf16.

    Args:
        architecture: transformers config fields, with `model_type`.
        attention: as in `load_model`.
        rope: as in `load_model`.
        dtype: `fp32 | bf16` or a torch dtype.
        seed: of the initialisation; the global generators are left as they were.
        meta: build without memory, on the meta device, for parameter counts.

    Raises:
        UserError: if a field is unknown or a value does not fit the architecture.
    """
    config = config_of(architecture)
    config, expected, method, name = configure(config, attention, rope, "architecture")
    with torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, attn_implementation=name, dtype=torch.float32
        )
    attach.guard_rotary(model, expected, method)
    fit_class(model)
    model.config.dtype = as_dtype(dtype)
    nn.Module.to(model, as_dtype(dtype))
    return model


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory, a `.gguf` file or a hub name.

    Raises:
        UserError: if there is none.
    """
    where, extra = locate(path)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(where, **extra)
    except FAILURES as error:
        raise cannot("read the tokenizer of", path, error) from error
    return tokenizer


def local_tokenizer(path: str) -> str:
    """Where the files that define a tokenizer are on this machine; a hub name is fetched.

    Raises:
        UserError: if the hub has no such tokenizer or cannot be reached.
    """
    if Path(path).exists():
        return path
    try:
        for name in ("tokenizer.model", "tokenizer.json"):
            found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
            if found is not None:
                return str(found)
    except FAILURES as error:
        raise cannot("read the tokenizer of", path, error) from error
    raise UserError(f"{path}: no tokenizer.model and no tokenizer.json there")


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """What a run prints of its model: rope as it is built, window, attention, size."""
    parameters = model.config.rope_parameters
    frequencies = attach.rotary_modules(model)[0].inv_freq
    known = frequencies.device.type != "meta"
    return {
        "architecture": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": in_words(getattr(model.config.get_text_config(), RECORD, {"name": "full"})),
        "window": native_window(model.config),
        "rope_type": parameters["rope_type"],
        "rope_factor": parameters.get("factor", 1.0),
        "rope_base": parameters["rope_theta"],
        "inv_freq_first": float(frequencies[0]) if known else None,
        "inv_freq_last": float(frequencies[-1]) if known else None,
    }


def architecture_of(path: str) -> dict[str, Any]:
    """The configuration of a checkpoint as `build_model` takes it; no weight is read.

    Raises:
        UserError: if it cannot be read.
    """
    where, extra = locate(path)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(where, **extra)
    except FAILURES as error:
        raise cannot("read the configuration of", path, error) from error
    make_stock(config)
    fields: dict[str, Any] = config.to_diff_dict()
    known = AutoConfig.for_model(config.model_type)
    return {k: v for k, v in fields.items() if k == "model_type" or hasattr(known, k)}


def _forget_quantisation(model: PreTrainedModel) -> None:
    """The weights of a `.gguf` are de-quantised: lets the model be saved like any other."""
    model.hf_quantizer = None  # type: ignore[assignment]
    for owner, name in (
        (model.config, "quantization_config"),
        (model, "is_quantized"),
        (model, "quantization_method"),
    ):
        if hasattr(owner, name):
            delattr(owner, name)
