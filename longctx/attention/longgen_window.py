"""LongGen with attention sinks and a window: most layers see the first and the recent tokens.

In a sparse layer a query sees the first S tokens of its document and the last W; a few full layers
in the middle see everything. Positions are the true ones: the model is trained with the pattern.
Cost: s (S + W) pairs a sparse layer, S + W cached tokens in it however long the document.
Source: Ge et al. 2410.01485; numbers are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longctx.attention.method import EvictingMethod, LayerCall
from longctx.attention.ops import causal, full_layers, merge, sinks_window
from longctx.errors import UserError


@dataclass(frozen=True)
class LongGenWindow(EvictingMethod):
    """The numbers of LongGen with sinks and a window.

    Args:
        sink_tokens: S, first tokens that every query sees.
        window_tokens: W, recent tokens that a query sees, itself included.
        full_layers: `hourglass`, the middle third, or a list of layer indices.

    Raises:
        UserError: if a number is too small, or the layers are no list of indices.
    """

    sink_tokens: int = 64
    window_tokens: int = 1984
    full_layers: str | Sequence[int] = full_layers.HOURGLASS

    def __post_init__(self) -> None:
        if self.sink_tokens < 0:
            raise UserError(f"attention.sink_tokens={self.sink_tokens} must be at least 0")
        if self.window_tokens < 1:
            raise UserError(f"attention.window_tokens={self.window_tokens} must be at least 1")
        if self.whole < 2:
            raise UserError("attention.sink_tokens + attention.window_tokens must be at least 2")
        full_layers.check(self.full_layers)

    def for_layers(self, layers: int, heads: int, key_heads: int) -> "LongGenWindow":
        """The same with the full layers as a list.

        Args:
            layers: of the model.
            heads: query heads; all are alike here.
            key_heads: all are alike here.

        Raises:
            UserError: if a full layer is none of the model's.
        """
        return replace(self, full_layers=full_layers.resolved(self.full_layers, layers))

    @property
    def whole(self) -> int:
        """See `EvictingMethod.whole`."""
        return self.sink_tokens + self.window_tokens

    def shrunk(self, layers: int, of_layers: int) -> "LongGenWindow":
        """Sixteen tokens, and the full layers at the same places; see `Method.shrunk`."""
        full = full_layers.scaled(self.full_layers, layers, of_layers)
        return replace(self, sink_tokens=4, window_tokens=12, full_layers=full)

    def is_full(self, layer: int) -> bool:
        """Whether a layer sees everything."""
        assert not isinstance(self.full_layers, str), "for_layers makes the list"
        return layer in self.full_layers

    def ring(self) -> tuple[int, int]:
        """(S, W): once both are full, a token takes the place of the oldest in the window."""
        return self.sink_tokens, self.window_tokens

    def kept_tokens(self, past: int) -> int:
        """Entries a sparse layer holds per key head after `past` tokens."""
        return min(past, self.whole)

    def seen(self, past: Tensor, layer: int) -> Tensor:
        """Keys that a query sees; see `Method.seen`."""
        return past + 1 if self.is_full(layer) else (past + 1).clamp(max=self.whole)

    def kept_positions(self, past: Tensor, key_heads: Tensor) -> Tensor:
        """Positions of those entries, `[b 1 K]`; see `EvictingMethod`."""
        kept = self.kept_tokens(int(past.max()))
        count = past.clamp(max=self.whole)[:, None]
        index = torch.arange(kept, device=past.device) - (kept - count)
        late = torch.where(index < self.sink_tokens, index, index + past[:, None] - count)
        return late.masked_fill(index < 0, -1)[:, None]

    def sees(self, i: Tensor, j: Tensor, key_heads: Tensor) -> Tensor:
        """Which pairs attend in a sparse layer."""
        return (j <= i) & ((j < self.sink_tokens) | (i - j < self.window_tokens))

    def definition(self, i: Tensor, j: Tensor, layer: int, head: Tensor) -> tuple[Tensor, Tensor]:
        """Which pairs attend, and at which rotary distance; see `Method.definition`."""
        return j <= i if self.is_full(layer) else self.sees(i, j, head), i - j

    def document(self, q: Tensor, k: Tensor, v: Tensor, first: int, call: LayerCall) -> Tensor:
        """The fast path of one document of a sparse layer; see `Method.document`."""
        n = q.shape[2]
        if n <= self.whole:
            return causal.sdpa(q, k, v, call.scaling, 0.0, causal=n > 1)
        # A GPU's kernel skips what is not seen, so there a chunk may be all of a window.
        rows = self.window_tokens if q.is_cuda else None
        sizes = n, n, self.window_tokens, self.sink_tokens
        blocks = list(sinks_window.blocks(*sizes, None, None, rows))
        return merge.attend(q, k, v, blocks, {}, None, call.scaling)
