"""Checkpoints of the public CEPE code: read, and written back.

Their names are this project's own; what differs is the configuration: one Llama's, with the
encoder's inside. Source: the layout of princeton-nlp/CEPE (2402.16617) and of its released models.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from transformers import LlamaConfig, PreTrainedConfig

from longctx.errors import UserError
from longctx.models.cepe.files import load_cepe
from longctx.models.cepe.model import CepeConfig, CepeForCausalLM
from longctx.models.choose import FAILURES, Attention, Dtype, cannot, locate

KEYS = ("encoder_config", "encoder_hidden_size", "num_cross_attn_layers", "do_cross_attention")


def load(path: str | Path, attention: Attention = None, dtype: Dtype = None) -> CepeForCausalLM:
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
    return load_cepe(path, attention, dtype=dtype, config=_translated(fields, str(path)))


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
