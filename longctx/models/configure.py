"""Rope and attention into a configuration, before a model is built from it.

Transformers 5 ignores a rope that is set afterwards. Costs nothing.
"""

import dataclasses
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedConfig

from longctx import rope as scaling
from longctx.attention.method import Method
from longctx.models import attach
from longctx.models.architecture import check_decoder
from longctx.models.choose import Attention, Rope, attention_method, rope_config
from longctx.models.export.classes import make_stock
from longctx.models.export.restore import RECORD


class Configured(NamedTuple):
    """A configuration that is ready to be built, and what the built model is held to.

    Args:
        config: with rope and attention.
        frequencies: the inverse frequencies `[d/2]` and the factor on cos and sin that the built
            model must have; None: not known here.
        method: the attention.
        name: transformers' name of that attention.
    """

    config: PreTrainedConfig
    frequencies: tuple[Tensor, float] | None
    method: Method
    name: str


def native_window(config: PreTrainedConfig) -> int:
    """The window that a configuration claims, tokens."""
    return int(config.max_position_embeddings)


def configure(config: PreTrainedConfig, attention: Attention, rope: Rope, where: str) -> Configured:
    """Puts rope and attention into a configuration, before anything is built.

    Args:
        config: of the checkpoint; changed in place.
        attention: None: what the configuration records, else full attention.
        rope: None: as the configuration has it.
        where: it is from, for messages.

    Raises:
        UserError: if it is not a decoder that can be extended, or a choice does not fit it.
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
    method = attention_method(attention).for_window(native_window(config))
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    method = method.for_layers(config.num_hidden_layers, heads, key_heads)
    if hasattr(config, RECORD):
        delattr(config, RECORD)
    if not method.plain:
        setattr(config, RECORD, {"name": method.name, **dataclasses.asdict(method)})
    return Configured(config, expected, method, attach.register_attention(method, config))
