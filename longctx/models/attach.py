"""Fits an attention method and exact rotary frequencies into transformers' stock model classes.

With `load.py` the one place that touches transformers' internals: the attention and mask
interfaces, the rotary module, and hooks before attention layers. Nothing global is overwritten; a
method gets a name of its own, and only the model at hand is changed.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from longctx.attention.method import EvictingMethod, Method
from longctx.attention.ops.oracle import rotate
from longctx.errors import UserError
from longctx.models import dynamic_rope, evicting_cache

MARK = "longctx_keys"  # attribute of the caches that were filled here
TRUE = "true positions"  # also of a cache without mark: it comes from a plain model
LATE = "_late_rotary"  # ends the name of an attention that rotates by itself, in transformers


def register_attention(method: Method, config: PreTrainedConfig) -> str:
    """Makes a method known to transformers, under a name of its own that holds its numbers.

    Where the angles of the model depend on the length of the call, the method rotates by itself.

    Raises:
        UserError: if it would have to rotate keys that it has evicted.
    """
    numbers = dataclasses.asdict(method)
    attend: Callable[..., Any] = method.attend
    name = "longctx_" + method.name
    if numbers:
        name += "_" + hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()[:8]
    if dynamic_rope.wanted(config):
        if isinstance(method, EvictingMethod):
            raise UserError(
                f"attention {method.name!r} evicts cached keys, and a dynamic rope rotates "
                "all of them in every call: choose another rope"
            )
        name += LATE
        attend = dynamic_rope.rotating(method.name, attend)
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, _padding_mask)
    return name


def rotates_late(config: PreTrainedConfig) -> bool:
    """Whether the attention that this model uses now rotates by itself (`dynamic_rope.py`)."""
    return str(config._attn_implementation).endswith(LATE)


def _padding_mask(
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    **rest: Any,
) -> Tensor | None:
    """Passes on the `[b n]` padding mask, or None without padding; positions mark documents.

    Raises:
        UserError: if transformers asks for a mask that would be dropped.
    """
    if rest.get("use_vmap") or rest.get("local_size") is not None:
        raise UserError("longctx attention takes no overlay on the causal mask (window, prefix)")
    if isinstance(q_offset, Tensor) or q_offset + q_length != kv_offset + kv_length:
        raise UserError(
            f"{q_length} queries at {q_offset} do not end where {kv_length} keys end: the "
            "attention mask must have one entry a key, and a static cache is not supported"
        )
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask[:, -kv_length:]


class _Rotary(nn.Module):
    """Mixed into the model's rotary class: frequencies stay fp32, and depend on this call only.

    Where a method says so, keys and queries are rotated to other positions than the true ones; the
    true ones travel on to the attention, which turns the queries where it must.
    """

    config: PreTrainedConfig
    inv_freq: Tensor
    original_inv_freq: Tensor
    key_positions: Callable[[Tensor], Tensor] | None = None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves buffers but keeps their dtype: rounded frequencies give wrong angles at length."""
        kept = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in kept.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def forward(self, x: Tensor, position_ids: Tensor, *rest: Any, **named: Any) -> Any:
        if rotates_late(self.config):
            return dynamic_rope.identity(x, position_ids, self.inv_freq.numel())
        if self.key_positions is not None:
            position_ids = self.key_positions(position_ids)
        if self.rope_type == "dynamic":
            # Transformers keeps the base of the longest call so far; a shorter one must not see it.
            self.max_seq_len_cached = self.original_max_seq_len
            self.inv_freq = self.original_inv_freq
        return super().forward(x, position_ids, *rest, **named)


@cache
def _exact(rotary: type[nn.Module]) -> type[nn.Module]:
    return type(rotary.__name__, (_Rotary, rotary), {"__module__": rotary.__module__})


def rotary_modules(model: nn.Module) -> list[Any]:
    """The modules that hold inverse frequencies."""
    return [m for m in model.modules() if "inv_freq" in dict(m.named_buffers(recurse=False))]


def guard_rotary(
    model: PreTrainedModel, expected: tuple[Tensor, float] | None, method: Method
) -> None:
    """Asserts and guards the rotary frequencies, lets the method set positions, marks caches.

    Raises:
        RuntimeError: if the built model does not rotate as asked.
    """
    for module in rotary_modules(model):
        kind: type[nn.Module] = type(module)
        if not issubclass(kind, _Rotary):
            module.__class__ = _exact(kind)  # type: ignore[arg-type]  # a class is hashable
        built = module.inv_freq
        if expected is None or built.device.type == "meta":
            continue
        want, factor = expected
        right = built.dtype == torch.float32 and built.shape == want.shape
        # 5e-6: fp32 powers of bases up to 1e8 are off by less than 3e-6.
        right = right and torch.allclose(built.double().cpu(), want, rtol=5e-6, atol=0)
        if not right or abs(module.attention_scaling - factor) > 1e-6:
            raise RuntimeError(
                f"the built model's rope differs from longctx.rope: inv_freq {built.dtype} ends in "
                f"{float(built[-1]):.9g} for {float(want[-1]):.9g}, cos and sin are scaled by "
                f"{module.attention_scaling} for {factor}"
            )
    if method.turns_queries:
        _require_one_rope(model, method.name)
    rotates = method.turns_queries or rotates_late(model.config)
    if rotates:
        what = f"attention {method.name!r}" if method.turns_queries else "dynamic rope"
        _require_halves(model, what)
    for layer in attention_layers(model):  # last: what was refused has changed nothing
        remove_hooks(layer, Lender)
        if rotates:
            set_hook(layer, Lender(rotary_modules(model)[0]))
    for module in rotary_modules(model):
        module.key_positions = method.key_positions if method.moves_keys else None
    mark_caches(model, method)


class Lender:
    """Hands the model's rotary module to the attention of a layer, as its hook.

    It travels as the keyword argument `rotary`, beside `position_ids`. A copy of the model copies
    hooks and rotary module together.
    """

    def __init__(self, rotary: nn.Module) -> None:
        self.rotary = rotary

    def __call__(self, layer: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """The layer's arguments, and `rotary`."""
        return args, {**named, "rotary": self.rotary}


def _require_one_rope(model: PreTrainedModel, name: str) -> None:
    """Raises UserError if the frequencies depend on the length or on the layer."""
    kind = model.config.model_type
    rotary = rotary_modules(model)
    if len(rotary) != 1 or rotary[0].rope_type in ("dynamic", "longrope"):
        what = f"{len(rotary)} rotary modules" if len(rotary) != 1 else rotary[0].rope_type
        raise UserError(f"attention {name!r} needs one rope for all lengths; {kind!r} has {what}")


def _require_halves(model: PreTrainedModel, what: str) -> None:
    """Raises UserError if an attention layer does not rotate, or otherwise than in halves."""
    kind = model.config.model_type
    rotary = rotary_modules(model)[0]
    for layer in attention_layers(model):
        if not getattr(layer, "use_rope", True):
            raise UserError(f"{what}: {kind!r} has layers that do not rotate")
        if not _rotates_in_halves(type(layer), rotary):
            raise UserError(f"{what}: {kind!r} lays out its rotary pairs otherwise")


def _rotates_in_halves(layer: type[nn.Module], rotary: Any) -> bool:
    """Whether the layer's module rotates pairs (k, k + d/2) of the first dimensions."""
    apply = getattr(sys.modules[layer.__module__], "apply_rotary_pos_emb", None)
    if apply is None:
        return False
    half = rotary.inv_freq.numel()
    x = torch.linspace(-1, 1, 2 * half, dtype=torch.float64)[None, None, None]
    angles = torch.linspace(0.1, 1, half, dtype=torch.float64)[None, None]
    both = torch.cat((angles, angles), dim=-1)
    try:
        turned = apply(x, x, both.cos(), both.sin())[0]
    except (TypeError, RuntimeError, ValueError):
        return False
    return turned.shape == x.shape and torch.allclose(turned, rotate(x, angles[:, None]))


class CacheGuard:
    """A cache belongs to the attention that filled it: keys rotated for another one are refused.

    Runs before the first attention layer, as its hook: it marks an empty cache with what its keys
    are rotated for, and compares the mark of a filled one. Reordering, selecting and copying a
    cache keep the mark, and a copy of the model copies the hook. An attention that evicts tokens
    gets its own kind of layers in the empty cache here, whoever made it, and is told before each
    call where padding stands. Costs a comparison a call.

    Args:
        method: the attention of the layer.
        mark: what its keys are rotated for.
        layers: how many the model has.
    """

    def __init__(self, method: Method, mark: str, layers: int) -> None:
        self.method, self.mark, self.layers = method, mark, layers

    def __call__(self, layer: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Marks an empty cache, and raises UserError for one that another attention filled."""
        for given in (*args, *named.values()):
            if not isinstance(given, Cache):
                continue
            columns = int(given.get_seq_length(layer.layer_idx))
            if not columns:
                evicting_cache.fit_layers(given, self.method, self.layers)
                setattr(given, MARK, self.mark)
            elif (theirs := getattr(given, MARK, TRUE)) != self.mark:
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
                evicting_cache.announce(given, call)


def attention_layers(model: nn.Module) -> list[Any]:
    """The decoder's self-attention modules, in order."""
    return [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]


def set_hook(layer: nn.Module, hook: Any) -> None:
    """Makes `hook(layer, args, named)` run before a layer, in place of one of the same class."""
    remove_hooks(layer, type(hook))
    layer.register_forward_pre_hook(hook, with_kwargs=True)


def remove_hooks(layer: nn.Module, kind: type) -> None:
    """Takes hooks of a class off a layer."""
    for key in [key for key, held in layer._forward_pre_hooks.items() if isinstance(held, kind)]:
        del layer._forward_pre_hooks[key], layer._forward_pre_hooks_with_kwargs[key]


def mark_caches(model: PreTrainedModel, method: Method) -> None:
    """Lets the model refuse caches with keys that its attention cannot read.

    Args:
        model: with its attention set.
        method: that attention; methods that leave keys at their true positions share caches.
    """
    elsewhere = method.moves_keys or rotates_late(model.config)
    name = model.config._attn_implementation
    mark = name if elsewhere else TRUE
    if isinstance(method, EvictingMethod):
        mark = f"{TRUE}, as far as {name} keeps them"
    layers = attention_layers(model)
    for layer in layers[:1]:
        set_hook(layer, CacheGuard(method, mark, 1 + max(each.layer_idx for each in layers)))
