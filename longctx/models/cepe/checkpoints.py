"""CEPE models on disk: this project's own, and those of the public CEPE code, read and written.

The public code's parameter names are this project's own; what differs is the configuration: one
Llama's, with the encoder's inside. Costs one reading of the weights.
Source: the layout of princeton-nlp/CEPE (2402.16617) and of its released models.
"""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import nn
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

from longctx.errors import UserError
from longctx.models.cepe.configuration import CepeConfig, guard_decoder
from longctx.models.cepe.encoder import guard
from longctx.models.cepe.model import CepeForCausalLM
from longctx.models.choose import Attention, Rope
from longctx.models.configure import configure
from longctx.models.files import FAILURES, Dtype, as_dtype, cannot, load_checked, locate
from longctx.models.switch import switch

KEYS = ("encoder_config", "encoder_hidden_size", "num_cross_attn_layers", "do_cross_attention")


def load_cepe(
    path_or_model: str | Path | PreTrainedModel,
    attention: Attention = None,
    rope: Rope = None,
    dtype: Dtype = None,
    device: str | torch.device | None = None,
    config: CepeConfig | None = None,
) -> PreTrainedModel:
    """A whole CEPE model, as `save_pretrained` writes it; what `load_model` calls for this type.

    Args:
        path_or_model: a directory, or a hub name; or a built model, whose decoder gets another
            attention in place.
        attention: of the decoder: a method's name, or a mapping of `name` and its numbers. None: as
            recorded, else full attention.
        rope: scaling of the decoder. None: the checkpoint's own.
        dtype: `fp32 | bf16` or a torch dtype. None: the checkpoint's own.
        device: where to put it. None: CPU, or where it is.
        config: in place of the one in the directory; then weights may also be a `.bin` of tensors.

    Raises:
        UserError: if it cannot be read, or lacks weights.
    """
    if isinstance(path_or_model, PreTrainedModel):
        return _switch_decoder(path_or_model, attention, dtype, device)
    path, safe = path_or_model, config is None
    if config is None:
        try:
            config = CepeConfig.from_pretrained(locate(str(path))[0])
        except FAILURES as error:
            raise cannot("read the CEPE configuration of", str(path), error) from error
    config.decoder_config, *_ = configure(config.decoder_config, attention, rope, str(path))
    model: CepeForCausalLM = load_checked(CepeForCausalLM, path, config, dtype, safe)
    guard_decoder(model.model)
    guard(model.encoder)
    if device is not None:
        nn.Module.to(model, device)
    return model


def _switch_decoder(
    model: PreTrainedModel, attention: Attention, dtype: Dtype, device: str | torch.device | None
) -> PreTrainedModel:
    """Another attention for the decoder; the encoder keeps its own, which has two directions."""
    kept = model.dtype if dtype is None else as_dtype(dtype)
    switch(model.get_decoder(), attention)
    model.config.dtype = kept
    return nn.Module.to(model, device=device, dtype=kept)


def from_reference_checkpoint(
    path: str | Path, attention: Attention = None, dtype: Dtype = None
) -> CepeForCausalLM:
    """A checkpoint of the public code, such as the released CEPE-LLaMA-2-7B.

    Args:
        path: a directory with safetensors or `.bin` weights, whole or in shards; or a hub name.
        attention: of the decoder, as in `load_model`. None: full.
        dtype: `fp32 | bf16` or a torch dtype. None: the checkpoint's own.

    Raises:
        UserError: if it cannot be read, or is of another layout.
    """
    where, _ = locate(str(path))
    try:
        fields, _ = PreTrainedConfig.get_config_dict(where)
    except FAILURES as error:
        raise cannot("read the configuration of", str(path), error) from error
    model = load_cepe(path, attention, dtype=dtype, config=_translated(fields, str(path)))
    assert isinstance(model, CepeForCausalLM)
    return model


def to_reference_checkpoint(model: CepeForCausalLM, directory: str | Path) -> None:
    """Writes a model in the layout that the public code reads, as safetensors.

    Args:
        model: with a Llama decoder.
        directory: where; made if it is not there.

    Raises:
        UserError: if that layout cannot say what the model is, or it cannot be written.
    """
    config = model.config
    if config.decoder_config.model_type != "llama":
        kind = config.decoder_config.model_type
        raise UserError(f"the reference layout holds a Llama decoder, not {kind!r}")
    target, encoder = Path(directory), config.encoder_config.to_dict()
    fields = config.decoder_config.to_dict() | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalContextLM"],
        "encoder_config": encoder | {"model_type": "llama", "is_encoder": True},
        "encoder_hidden_size": encoder["hidden_size"],
        "num_cross_attn_layers": len(model.cross_attending()),
        "do_cross_attention": True,
    }
    for part in (fields, fields["encoder_config"]):  # as transformers 4 had it
        rope = part.pop("rope_parameters")
        if rope["rope_type"] != "default":
            raise UserError(f"the reference layout has no rope scaling {rope['rope_type']!r}")
        part["rope_theta"] = rope["rope_theta"]
    try:
        target.mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(model.state_dict(), target)
        (target / "config.json").write_text(json.dumps(fields, indent=1))
    except OSError as error:
        raise UserError(f"cannot write {target}: {error}") from error


def _translated(fields: dict[str, Any], where: str) -> CepeConfig:
    """One configuration of three parts, from one Llama's with more keys.

    Raises:
        UserError: if it is not of that layout.
    """
    absent = [key for key in KEYS if key not in fields]
    if absent or not fields["do_cross_attention"]:
        what = f"lacks {', '.join(absent)}" if absent else "has do_cross_attention=false"
        raise UserError(
            f"{where} is not a checkpoint of the CEPE reference: its config.json {what}"
        )
    encoder = dict(fields["encoder_config"])
    if encoder.get("hidden_size") != fields["encoder_hidden_size"]:
        raise UserError(
            f"{where}: encoder_hidden_size={fields['encoder_hidden_size']} is not the encoder's "
            f"hidden_size={encoder.get('hidden_size')}"
        )
    if (fields.get("num_cross_attn_hidden_states") or 1) != 1:
        raise UserError(f"{where} has encoder states of several layers, which are not supported")
    known = LlamaConfig()
    decoder, encoder = (
        {k: v for k, v in part.items() if _is_field(known, k)} for part in (fields, encoder)
    )
    many = fields["num_cross_attn_layers"]
    entries = encoder["vocab_size"]
    return CepeConfig(
        decoder_config={"model_type": "llama", **decoder},
        encoder_config=encoder,
        cross_layers=None if many == decoder["num_hidden_layers"] else many,
        mask_token_id=entries - 1 if entries == decoder["vocab_size"] + 1 else None,
    )


def _is_field(known: PreTrainedConfig, key: str) -> bool:
    """Whether it describes a Llama's shape or rope, and not where the file came from."""
    origin = ("model_type", "architectures", "transformers_version", "dtype", "torch_dtype")
    rope = ("rope_theta", "rope_scaling")
    return (key in rope or hasattr(known, key)) and key not in origin and not key.startswith("_")
