"""Wraps the attention of a built model in a function of the same signature.

The model's own method stays the one that an export records; the wrapped one is registered with
transformers under a name of its own. Costs nothing.
"""

from collections.abc import Callable
from typing import Any

from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from longctx.errors import UserError
from longctx.models import attach

Attend = Callable[..., Any]


def wrap_attention(decoder: Any, around: Callable[[Attend], Attend], label: str) -> None:
    """Lets all layers of a model call `around(attend)` instead of their method's `attend`.

    Args:
        decoder: what `get_decoder()` of a model from longctx gives; changed in place.
        around: from a function with transformers' attention-interface signature to another.
        label: prefix of the new name, which must be unique in this process. The end of the name
            stays: it says whether the method rotates itself.
    """
    name = decoder.config._attn_implementation
    assert name.startswith("longctx_"), name
    wrapped = f"{label}_{name}"
    AttentionInterface.register(wrapped, around(AttentionInterface()[name]))
    AttentionMaskInterface.register(wrapped, AttentionMaskInterface()[name])
    decoder.config._attn_implementation = wrapped


def attention_heads(decoder: Any) -> tuple[int, int]:
    """Query heads and key heads of each layer."""
    config = decoder.config
    heads = int(config.num_attention_heads)
    return heads, int(getattr(config, "num_key_value_heads", None) or heads)


def require_angles_by_position(decoder: Any, setting: str) -> None:
    """Raises UserError if a token's angles depend on tokens that a rank may not hold.

    An attention that rotates itself (`dynamic_rope.py`) sees the whole row.

    Args:
        decoder: what `get_decoder()` gives.
        setting: that splits a row over ranks, for the message.
    """
    for rotary in attach.rotary_modules(decoder):
        late = attach.rotates_late(rotary.config)
        if rotary.rope_type in ("dynamic", "longrope") and not late:
            raise UserError(
                f"{setting}: the angles of rope {rotary.rope_type!r} depend on the longest "
                "position in a row, which a rank with a part of it does not know"
            )
