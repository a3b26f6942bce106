"""Load or build a decoder with a rope scaling and an attention method.

The model stays the stock transformers class. Rope is set on the configuration before the model is
built, because transformers 5 ignores it afterwards, and the frequencies of the built model are
asserted against `longctx.rope`. Costs one reading of the weights.
"""

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from longctx import rope as scaling
from longctx.errors import UserError
from longctx.models import attach
from longctx.models.architecture import check_decoder, config_of
from longctx.models.choose import (
    FAILURES,
    Attention,
    Dtype,
    Rope,
    attention_method,
    cannot,
    in_words,
    locate,
    rope_config,
)
from longctx.models.export.classes import fit_class, make_stock
from longctx.models.export.restore import RECORD as RECORD  # noqa: PLC0414 - part of what is loaded
from longctx.models.switch import switch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
        return _built(path_or_model, attention, rope, dtype, device)
    path = str(path_or_model)
    where, extra = locate(path)
    try:
        config = AutoConfig.from_pretrained(where, **extra)
    except FAILURES as error:
        raise cannot("read the configuration of", path, error) from error
    if config.model_type == "longctx_cepe":
        from longctx.models.cepe.files import load_cepe  # it needs this module

        return load_cepe(path, attention, rope, dtype, device)
    config, expected, method, name = _prepare(config, attention, rope, path)
    options: dict[str, Any] = {**extra, "dtype": "auto" if dtype is None else _dtype(dtype)}
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
    unknown = [k for k in info["unexpected_keys"] if not k.endswith("rotary_emb.inv_freq")]
    for keys, fault in ((info["missing_keys"], "lacks"), (unknown, "has the unknown")):
        if keys:
            raise UserError(f"{path} {fault} weights {sorted(keys)[:3]} ({len(keys)} in all)")
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
    config, expected, method, name = _prepare(config, attention, rope, "architecture")
    with torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, attn_implementation=name, dtype=torch.float32
        )
    attach.guard_rotary(model, expected, method)
    fit_class(model)
    model.config.dtype = _dtype(dtype)
    nn.Module.to(model, _dtype(dtype))
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


def native_window(config: PreTrainedConfig) -> int:
    """The window that a configuration claims, tokens."""
    return int(config.max_position_embeddings)


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


def _built(
    model: PreTrainedModel,
    attention: Attention,
    rope: Rope,
    dtype: Dtype,
    device: str | torch.device | None,
) -> PreTrainedModel:
    """`load_model` of what is loaded already."""
    if rope is not None:
        raise UserError("rope= cannot change a model that is built: give it where you load it")
    if hasattr(model, "encode"):  # the decoder's attention changes, the encoder's stays
        _built(model.get_decoder(), attention, None, None, None)
        model.config.dtype = model.dtype if dtype is None else _dtype(dtype)
        return nn.Module.to(model, device=device, dtype=model.config.dtype)
    config = copy.deepcopy(model.config)
    prepared = _prepare(config, attention, None, type(model).__name__)
    return switch(model, prepared, None if dtype is None else _dtype(dtype), device)


def _prepare(
    config: PreTrainedConfig, attention: Attention, rope: Rope, where: str
) -> tuple[PreTrainedConfig, tuple[Tensor, float] | None, Any, str]:
    """Puts rope and attention into a configuration, before anything is built.

    Returns:
        (the configuration, the expected frequencies or None if not known here, the attention
        method, transformers' name of it).
    """
    make_stock(config)
    check_decoder(config, where)
    window, native = native_window(config), dict(config.rope_parameters)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    chosen = rope_config(rope)
    if chosen.name == "none":
        described = scaling.from_native(native)
        origin = int(native.get("original_max_position_embeddings") or window)
    else:
        described, origin = chosen, window
        config.rope_parameters = scaling.rope_parameters(chosen, native, window, dim)
        config.max_position_embeddings = scaling.extended_window(chosen, window)
    expected = None
    if described is not None:
        expected = scaling.inv_freq(described, float(native["rope_theta"]), origin, dim)
    if attention is None:
        attention = getattr(config, RECORD, None) or "full"
    method = attention_method(attention)
    if hasattr(method, "for_window"):
        method = method.for_window(native_window(config))
    if hasattr(method, "for_layers"):
        heads = config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        method = method.for_layers(config.num_hidden_layers, heads, key_heads)
    if hasattr(config, RECORD):
        delattr(config, RECORD)
    if dataclasses.fields(method):
        setattr(config, RECORD, {"name": attach.method_name(method), **dataclasses.asdict(method)})
    return config, expected, method, attach.register_attention(method, config)


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


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype by its short name, `fp32 | bf16`, or as it is."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[dtype]
