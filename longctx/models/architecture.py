"""Which transformers architectures can be extended, and their configurations from plain fields."""

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from longctx.errors import UserError
from longctx.models.files import FAILURES, cannot


def check_decoder(config: PreTrainedConfig, where: str) -> None:
    """Raises UserError unless it is a decoder with one rope and without a sliding window.

    Args:
        config: of the model.
        where: it is from, for the message.
    """
    kind = config.model_type
    known = type(config) in AutoModelForCausalLM._model_mapping and not kind.startswith("longctx")
    if not known or config.is_encoder_decoder:
        raise UserError(f"{where}: {kind!r} is not a decoder-only language model")
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        raise UserError(f"{where}: {kind!r} has no rotary embeddings, which longctx extends")
    if "rope_theta" not in parameters:
        raise UserError(f"{where}: {kind!r} has a rope per layer type, which is not supported")
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or [])
    if sliding or getattr(config, "sliding_window", None) is not None:
        raise UserError(
            f"{where}: {kind!r} has an active sliding window ({config.sliding_window} tokens), "
            "which is not supported; set sliding_window to null to attend to everything"
        )


def config_of(architecture: Mapping[str, Any]) -> PreTrainedConfig:
    """A configuration made of fields.

    Args:
        architecture: transformers config fields, with `model_type`.

    Raises:
        UserError: if one is unknown, or its value cannot be used.
    """
    fields = dict(architecture)
    kind = fields.pop("model_type", None)
    if not kind:
        raise UserError("model.architecture needs model_type, for example llama")
    try:
        known = AutoConfig.for_model(kind)
        for key in fields:
            if not hasattr(known, key) and key != "rope_theta":
                raise UserError(f"model.architecture.{key} is not a field of {kind!r}")
        config: PreTrainedConfig = AutoConfig.for_model(kind, **fields)
    except UserError:
        raise
    except FAILURES as error:
        raise cannot("build", f"model.architecture of {kind!r}", error) from error
    return config
