"""A cache belongs to the attention that filled it: keys rotated for another one are refused.

The first attention layer marks an empty cache with what its keys are rotated for, and compares the
mark of a filled one. Reordering, selecting and copying a cache keep it. Costs a comparison a call.
"""

from typing import Any

from torch import nn
from transformers import Cache, PreTrainedModel

from longctx.errors import UserError
from longctx.models import late_rotary

MARK = "longctx_keys"  # attribute of the layer and of the caches that it filled
TRUE = "true positions"  # also of a cache without mark: it comes from a plain model


def attention_layers(model: nn.Module) -> list[Any]:
    """The decoder's self-attention modules, in order."""
    return [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]


def mark_caches(model: PreTrainedModel, method: Any) -> None:
    """Lets the model refuse caches with keys that its attention cannot read.

    Args:
        model: with its attention set.
        method: that attention; methods that leave keys at their true positions share caches.
    """
    elsewhere = hasattr(method, "key_positions") or late_rotary.attached(model.config)
    for layer in attention_layers(model)[:1]:
        if MARK not in layer.__dict__:
            layer.register_forward_pre_hook(_compare, with_kwargs=True)
        layer.__dict__[MARK] = model.config._attn_implementation if elsewhere else TRUE


def _compare(layer: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Marks an empty cache, and raises UserError for one that another attention filled."""
    ours = layer.__dict__[MARK]
    for cache in (*args, *named.values()):
        if not isinstance(cache, Cache):
            continue
        if not cache.get_seq_length(layer.layer_idx):
            setattr(cache, MARK, ours)
        elif (theirs := getattr(cache, MARK, TRUE)) != ours:
            raise UserError(
                f"the cache holds keys rotated for {theirs}, and this model's attention needs "
                f"them rotated for {ours}: start with an empty cache"
            )
