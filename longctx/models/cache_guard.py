"""A cache belongs to the attention that filled it: keys rotated for another one are refused.

The first attention layer marks an empty cache with what its keys are rotated for, and compares the
mark of a filled one. Reordering, selecting and copying a cache keep it. An attention that evicts
tokens gets its own kind of layers in the empty cache here, whoever made it, and is told before each
call where padding stands. Costs a comparison a call.
"""

from typing import Any

from torch import nn
from transformers import Cache, PreTrainedModel

from longctx.errors import UserError
from longctx.models import dynamic_rope, evicting_cache
from longctx.models.evicting_call import Call

METHOD = "longctx_attention"  # attribute of the layer: what fills its caches
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
    elsewhere = hasattr(method, "key_positions") or dynamic_rope.attached(model.config)
    name = model.config._attn_implementation
    mark = name if elsewhere else TRUE
    if hasattr(method, "evicts"):
        mark = f"{TRUE}, as far as {name} keeps them"
    layers = attention_layers(model)
    for layer in layers[:1]:
        if MARK not in layer.__dict__:
            layer.register_forward_pre_hook(_compare, with_kwargs=True)
        count = 1 + max(each.layer_idx for each in layers)
        layer.__dict__[MARK], layer.__dict__[METHOD] = mark, (method, count)


def _compare(layer: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Marks an empty cache, and raises UserError for one that another attention filled."""
    ours = layer.__dict__[MARK]
    method, layers = layer.__dict__[METHOD]
    for cache in (*args, *named.values()):
        if not isinstance(cache, Cache):
            continue
        columns = int(cache.get_seq_length(layer.layer_idx))
        if not columns:
            evicting_cache.fit_layers(cache, method, layers)
            setattr(cache, MARK, ours)
        elif (theirs := getattr(cache, MARK, TRUE)) != ours:
            raise UserError(
                f"the cache holds keys rotated for {theirs}, and this model's attention needs "
                f"them rotated for {ours}: start with an empty cache"
            )
        if hasattr(method, "evicts"):
            mask = named.get("attention_mask")
            padding = mask if mask is not None and mask.dim() == 2 else None
            new = (args[0] if args else named["hidden_states"]).shape[1]
            call = Call(method, columns, new, padding, named.get("position_ids"))
            evicting_cache.announce(cache, call)
