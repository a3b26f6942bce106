"""A cache layer that holds what a static sparse attention can still need, and nothing else.

Which tokens those are depends on positions alone, so the method says it (`kept_tokens`,
`kept_positions`) and what a call adds and drops is worked out once for all layers, on the CPU: an
unpadded call waits for no device, a padded one once. A token's place is its count among the real
tokens of its row, whatever padding stands where. Masks and positions of transformers see the true
length. Cost: one copy of the kept rows a call, as in transformers' own cache; where a method has a
`ring`, a single token is written over the one that leaves the window, without autograd, and
nothing is copied.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from longctx.attention.method import EvictingMethod, Method
from longctx.attention.ops.segments import RESTART
from longctx.errors import UserError


class Call:
    """What one forward pass does to the kept layers; all of them share it.

    Args:
        method: the attention.
        columns: tokens a row before this call, padding and evicted ones included.
        new: s.
        padding: `[b columns+s]`, True or 1 on real tokens; None: all are real.
        positions: `[b s]` or `[1 s]`, of the new tokens; None: not checked.

    Raises:
        UserError: if the padding mask has another length, or new tokens do not continue their row.
    """

    def __init__(
        self,
        method: EvictingMethod,
        columns: int,
        new: int,
        padding: Tensor | None,
        positions: Tensor | None = None,
    ) -> None:
        self.method, self.columns, self.new = method, columns, new
        self.real: Tensor | None = None  # [b s], of the new tokens
        # [b 2], or [1 2] without padding: number of the real columns, and sum of their indices
        self.seen_before, self.seen_after = consecutive(columns), consecutive(columns + new)
        if padding is not None:
            if padding.shape[1] != columns + new:
                raise UserError(
                    f"the attention mask has {padding.shape[1]} columns, and cache and new tokens "
                    f"have {columns + new}"
                )
            self.real = padding[:, columns:].bool().cpu()
            self.seen_before = _sums(padding[:, :columns], 0).cpu()
            self.seen_after = self.seen_before + _sums(self.real, columns)
        self.past = self.seen_before[:, 0]  # [b] or [1]
        self.places = self.past[:, None] + torch.arange(new)  # [b s] or [1 s]; -1: padding
        if self.real is not None:
            count = self.past[:, None] + self.real.cumsum(1)
            self.places = (count - 1).masked_fill(~self.real, -1)
        if columns and positions is not None:
            places = self.places.to(positions.device)
            if bool(((positions != places) & (places >= 0)).any()):
                raise UserError(f"{RESTART}, from 0, in a row that continues a cache")
        self.ring = self._ring()
        self._kept: dict[tuple[int, torch.device], Tensor | slice] = {}

    def _ring(self) -> tuple[int, int] | None:
        """(sinks, window) where the new token of every row takes the place of an old one."""
        ring = self.method.ring() if self.new == 1 else None
        if ring is None:
            return None
        sinks, window = ring
        grown = int(self.past.min()) >= sinks + window
        every = self.real is None or bool(self.real.all())
        return (sinks, window) if grown and every else None

    def kept(self, heads: int, device: torch.device) -> Tensor | slice:
        """Which of the held and new entries stay: `[b|1 hk|1 k]`, or a slice, alike for all.

        Args:
            heads: hk, key heads.
            device: of the answer.
        """
        if (heads, device) not in self._kept:
            kept = self._work_out(heads)
            self._kept[heads, device] = kept if isinstance(kept, slice) else kept.to(device)
        return self._kept[heads, device]

    def _work_out(self, heads: int) -> Tensor | slice:
        which = torch.arange(heads)
        held = self.method.kept_positions(self.past, which)
        after = self.places.amax(1).maximum(self.past - 1) + 1
        want = self.method.kept_positions(after, which)
        rows, own = max(len(held), len(self.places)), self.places[:, None]
        shape = (rows, held.shape[1], -1)
        have = torch.cat((held.expand(shape), own.expand(shape)), dim=2)
        first = have.shape[2] - want.shape[2]
        if first >= 0 and bool(((want == have[:, :, first:]) | (want < 0)).all()):
            return slice(first, None)
        have = have.expand(-1, want.shape[1], -1).cummax(2).values  # ascending over padding
        return torch.searchsorted(have.contiguous(), want.expand(rows, -1, -1).contiguous())


class KeptLayer(CacheLayerMixin):
    """The keys and values of one sparse layer.

    `update` returns the entries held before the call, in order, then the new ones: `[b hk k+s d]`;
    an empty layer returns the new ones alone. In a ring it returns what the new token sees, in any
    order: `[b hk sinks+window d]`. Entries that a row or head does not have are arbitrary.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._clear()

    def _clear(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.is_initialized = False
        self._columns = 0  # tokens a row so far, padding and evicted ones included
        self._seen: Tensor | None = None  # [b 2] of the last call, to know its padding again
        self._turned = 0  # how far the oldest entry of the ring has moved
        self._ring = (0, 0)
        self._whole = True  # nothing was dropped yet
        self._own = False  # no graph and no caller holds these tensors
        self._call: Call | None = None

    def announce(self, call: Call) -> None:
        """Says what the next update is about; without that it is refused."""
        self._call = call

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes type and device of the first keys."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Adds new entries, drops what no later token needs, and returns what these ones need.

        Args:
            key_states: `[b hk s d]`.
            value_states: `[b hk s d]`.
            *args: of other layer classes; ignored.
            **kwargs: of other layer classes; ignored.

        Raises:
            UserError: if another attention calls, or the mask or the length is not that of the
                calls before.
        """
        call, self._call = self._call, None
        if call is None:
            raise UserError(
                "the cache holds what a sparse attention keeps, and another attention asks for it: "
                "start with an empty cache"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check(call)
        if call.ring is not None and self._writable(key_states):
            out = self._turn(call.ring, key_states, value_states)
        else:
            out = self._append(call, key_states, value_states)
        self._columns += call.new
        self._seen = call.seen_after.expand(len(key_states), 2)
        return out

    def _check(self, call: Call) -> None:
        if call.columns != self._columns:
            raise UserError(
                "a call that failed left the cache half filled: start with an empty one"
            )
        if self._seen is not None and bool((self._seen != call.seen_before).any()):
            raise UserError(
                f"the attention mask marks other padding in the first {self._columns} tokens than "
                "the calls that filled the cache: tokens that were evicted cannot be masked later"
            )

    def _writable(self, new: Tensor) -> bool:
        """Whether entries may be overwritten in place with new ones."""
        assert self.keys is not None
        alike = self.keys.dtype == new.dtype and len(self.keys) == len(new)
        frozen = self.keys.is_inference() and not torch.is_inference_mode_enabled()
        return self._own and alike and not torch.is_grad_enabled() and not frozen

    def _turn(self, ring: tuple[int, int], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the entries of one token over those of the token that leaves the window."""
        assert self.keys is not None
        assert self.values is not None
        sinks, window = self._ring = ring
        slot = sinks + self._turned
        self.keys[:, :, slot] = key[:, :, 0]
        self.values[:, :, slot] = value[:, :, 0]
        self._turned = (self._turned + 1) % window
        self._whole = False
        return self.keys, self.values

    def _append(self, call: Call, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Joins held and new entries in order, and holds what stays of them."""
        assert self.keys is not None
        assert self.values is not None
        joined = [
            new if not held.shape[2] else torch.cat((*self._in_order(held), new), dim=2)
            for held, new in ((self.keys, key), (self.values, value))
        ]
        kept = call.kept(key.shape[1], key.device)
        # Joined is new memory; what a single token drops of it is not worth another copy.
        ours = self.keys.shape[2] > 0 and (call.new == 1 or kept == slice(0, None))
        self.keys, self.values = (_chosen(x, kept, copy=not ours) for x in joined)
        self._turned = 0
        self._whole = self._whole and kept == slice(0, None)
        self._own = not torch.is_grad_enabled()
        return joined[0], joined[1]

    def _in_order(self, held: Tensor) -> tuple[Tensor, ...]:
        """The held entries in ascending order of position, in pieces."""
        if not self._turned:
            return (held,)
        start = self._ring[0]
        oldest = start + self._turned
        return held[:, :, :start], held[:, :, oldest:], held[:, :, start:oldest]

    def get_seq_length(self) -> int:
        """Tokens a row so far, evicted ones included."""
        return self._columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask, as if nothing were evicted."""
        return self._columns + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens, `-tokens_to_remove` of them.

        Raises:
            UserError: if something was evicted, which might be needed again then.
        """
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        if tokens_to_remove > 0:
            raise UserError(f"crop({tokens_to_remove}): give tokens to remove as a negative number")
        if not self._whole:
            raise UserError(
                f"crop({tokens_to_remove}): a cache that has evicted tokens cannot go back, so "
                "there is no assisted decoding with this attention"
            )
        assert self.keys is not None
        assert self.values is not None
        assert self._seen is not None
        before, self._columns = self._columns, max(0, self._columns + tokens_to_remove)
        # What is whole has its padding on the left.
        left = [min(before - int(real), self._columns) for real in self._seen[:, 0]]
        self._seen = torch.cat([consecutive(self._columns, padded) for padded in left])
        self.keys, self.values = (x[:, :, : self._columns] for x in (self.keys, self.values))
        self._own = False

    def reset(self) -> None:
        """Empties the layer."""
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Puts rows of the cache where beams went."""
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row."""
        self._rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Any) -> None:
        """Keeps some rows."""
        self._rows(lambda x: x[indices.to(x.device) if isinstance(indices, Tensor) else indices])

    def _rows(self, change: Any) -> None:
        if not self.is_initialized:
            return
        self.keys, self.values = change(self.keys), change(self.values)
        self._seen = None if self._seen is None else change(self._seen)


def _chosen(x: Tensor, kept: Tensor | slice, copy: bool) -> Tensor:
    """Entries `kept` of `x` `[b hk n d]`, in memory of their own if `copy`."""
    if isinstance(kept, slice):
        return x[:, :, kept].clone() if copy else x[:, :, kept]
    if kept.shape[:2] == (1, 1):
        return x.index_select(2, kept[0, 0])
    rows = torch.arange(len(x), device=x.device)[:, None, None]
    heads = torch.arange(x.shape[1], device=x.device)[:, None]
    return x[rows, heads, kept]


def fit_layers(cache: Any, method: Method, layers: int) -> None:
    """Gives an empty cache the layers that an attention fills.

    Args:
        cache: without any token.
        method: the attention; one that does not evict keeps every token in every layer.
        layers: how many the model has.

    Raises:
        UserError: if the attention evicts and the cache is not transformers' plain dynamic one.
    """
    held = getattr(cache, "layers", [])
    if not isinstance(method, EvictingMethod):
        if any(isinstance(layer, KeptLayer) for layer in held):
            cache.layers = [DynamicLayer() if isinstance(x, KeptLayer) else x for x in held]
        return
    kinds = {type(layer) for layer in held} - {DynamicLayer, KeptLayer}
    if kinds or not isinstance(cache, DynamicCache):
        kind = min(kind.__name__ for kind in kinds or {type(cache)})
        raise UserError(
            f"an attention that evicts tokens fills a DynamicCache of plain layers, not a {kind}"
        )
    # Typed by transformers as a union of its own classes.
    cache.layers = [DynamicLayer() if method.is_full(i) else KeptLayer() for i in range(layers)]


def announce(cache: Any, call: Call) -> None:
    """Tells every kept layer of a cache what the next update is about."""
    for layer in cache.layers:
        if isinstance(layer, KeptLayer):
            layer.announce(call)


def cache_bytes(cache: Any) -> int:
    """Bytes of all key and value tensors of a cache."""
    held = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    return sum(x.numel() * x.element_size() for x in held if x is not None)


def consecutive(count: int, padded: int = 0) -> Tensor:
    """`Call.seen_before` `[1 2]` of `count` columns of which the first `padded` are padding."""
    total = count * (count - 1) // 2 - padded * (padded - 1) // 2
    return torch.tensor([[count - padded, total]])


def _sums(real: Tensor, first: int) -> Tensor:
    """Number of real columns and sum of their indices, `[b 2]`; column 0 has the index `first`."""
    index = torch.arange(first, first + real.shape[1], device=real.device)
    return torch.stack((real.sum(1), (real * index).sum(1)), dim=1)
