"""A cache belongs to the attention that filled it: keys rotated for another one are refused.

The first attention layer marks an empty cache with what its keys are rotated for, and compares the
mark of a filled one. Reordering, selecting and copying a cache keep it. An attention that evicts
tokens gets its own kind of layers in the empty cache here, whoever made it, and is told before each
call where padding stands. Costs a comparison a call.
"""

from typing import Any

from torch import nn
from transformers import Cache, PreTrainedModel

from longctx.attention.method import EvictingMethod, Method
from longctx.errors import UserError
from longctx.models import dynamic_rope, evicting_cache

MARK = "longctx_keys"  # attribute of the caches that were filled here
TRUE = "true positions"  # also of a cache without mark: it comes from a plain model


class Guard:
    """Runs before the first attention layer, as its hook; a copy of the model copies it.

    Args:
        method: the attention of the layer.
        mark: what its keys are rotated for.
        layers: how many the model has.
    """

    def __init__(self, method: Method, mark: str, layers: int) -> None:
        self.method, self.mark, self.layers = method, mark, layers

    def __call__(self, layer: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Marks an empty cache, and raises UserError for one that another attention filled."""
        for cache in (*args, *named.values()):
            if not isinstance(cache, Cache):
                continue
            columns = int(cache.get_seq_length(layer.layer_idx))
            if not columns:
                evicting_cache.fit_layers(cache, self.method, self.layers)
                setattr(cache, MARK, self.mark)
            elif (theirs := getattr(cache, MARK, TRUE)) != self.mark:
                raise UserError(
                    f"the cache holds keys rotated for {theirs}, and this model's attention needs "
                    f"them rotated for {self.mark}: start with an empty cache"
                )
            if isinstance(self.method, EvictingMethod):
                mask = named.get("attention_mask")
                padding = mask if mask is not None and mask.dim() == 2 else None
                new = (args[0] if args else named["hidden_states"]).shape[1]
                positions = named.get("position_ids")
                call = evicting_cache.Call(self.method, columns, new, padding, positions)
                evicting_cache.announce(cache, call)


def attention_layers(model: nn.Module) -> list[Any]:
    """The decoder's self-attention modules, in order."""
    return [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]


def hang(layer: nn.Module, hook: Any) -> None:
    """Makes `hook(layer, args, named)` run before a layer, in place of one of the same class."""
    unhang(layer, type(hook))
    layer.register_forward_pre_hook(hook, with_kwargs=True)


def unhang(layer: nn.Module, kind: type) -> None:
    """Takes hooks of a class off a layer."""
    for key in [key for key, held in layer._forward_pre_hooks.items() if isinstance(held, kind)]:
        del layer._forward_pre_hooks[key], layer._forward_pre_hooks_with_kwargs[key]


def mark_caches(model: PreTrainedModel, method: Method) -> None:
    """Lets the model refuse caches with keys that its attention cannot read.

    Args:
        model: with its attention set.
        method: that attention; methods that leave keys at their true positions share caches.
    """
    elsewhere = method.moves_keys or dynamic_rope.attached(model.config)
    name = model.config._attn_implementation
    mark = name if elsewhere else TRUE
    if isinstance(method, EvictingMethod):
        mark = f"{TRUE}, as far as {name} keeps them"
    layers = attention_layers(model)
    for layer in layers[:1]:
        hang(layer, Guard(method, mark, 1 + max(each.layer_idx for each in layers)))
