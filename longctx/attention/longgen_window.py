"""LongGen with attention sinks and a window: most layers see the first and the recent tokens.

In a sparse layer a query sees the first S tokens of its document and the last W; a few full layers
in the middle see everything. Positions are the true ones: the model is trained with the pattern.
Cost: s (S + W) pairs a sparse layer, S + W cached tokens in it however long the document.
Source: Ge et al. 2410.01485; numbers are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from longctx.attention.ops import causal, evicted, merge, segments, sinks_window
from longctx.errors import UserError

NAME = "longgen_window"


@dataclass(frozen=True)
class LongGenWindow:
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
    full_layers: str | Sequence[int] = evicted.HOURGLASS

    def __post_init__(self) -> None:
        if self.sink_tokens < 0:
            raise UserError(f"attention.sink_tokens={self.sink_tokens} must be at least 0")
        if self.window_tokens < 1:
            raise UserError(f"attention.window_tokens={self.window_tokens} must be at least 1")
        if self.whole < 2:
            raise UserError("attention.sink_tokens + attention.window_tokens must be at least 2")
        evicted.check_full_layers(self.full_layers)

    def for_layers(self, layers: int, heads: int, key_heads: int) -> "LongGenWindow":
        """The same with the full layers as a list.

        Args:
            layers: of the model.
            heads: query heads; all are alike here.
            key_heads: all are alike here.

        Raises:
            UserError: if a full layer is none of the model's.
        """
        return replace(self, full_layers=evicted.resolved(self.full_layers, layers))

    @property
    def whole(self) -> int:
        """See `evicted.Pattern`."""
        return self.sink_tokens + self.window_tokens

    def evicts(self, layer: int) -> bool:
        """Whether a layer is sparse."""
        assert not isinstance(self.full_layers, str), "for_layers makes the list"
        return layer not in self.full_layers

    def ring(self) -> tuple[int, int]:
        """(S, W): once both are full, a token takes the place of the oldest in the window."""
        return self.sink_tokens, self.window_tokens

    def kept_tokens(self, past: int) -> int:
        """Entries a sparse layer holds per key head after `past` tokens."""
        return min(past, self.whole)

    def seen(self, past: Tensor) -> Tensor:
        """Keys that a query after so many tokens sees in a sparse layer, its own included."""
        return (past + 1).clamp(max=self.whole)

    def kept_positions(self, past: Tensor, key_heads: Tensor) -> Tensor:
        """Positions of those entries, `[b 1 K]`; see `evicted.Pattern`."""
        kept = self.kept_tokens(int(past.max()))
        count = past.clamp(max=self.whole)[:, None]
        index = torch.arange(kept, device=past.device) - (kept - count)
        late = torch.where(index < self.sink_tokens, index, index + past[:, None] - count)
        return late.masked_fill(index < 0, -1)[:, None]

    def sees(self, i: Tensor, j: Tensor, key_heads: Tensor) -> Tensor:
        """Which pairs attend in a sparse layer."""
        return (j <= i) & ((j < self.sink_tokens) | (i - j < self.window_tokens))

    def definition(self, i: Tensor, j: Tensor, layer: int, head: Tensor) -> tuple[Tensor, Tensor]:
        """Which pairs attend, and at which rotary distance; see `Full.definition`."""
        return self.sees(i, j, head) if self.evicts(layer) else j <= i, i - j

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """The fast path, with transformers' attention-interface signature; see `Full.attend`.

        Raises:
            UserError: if a mask or argument asks for something that would not be honoured, or a
                document of a sparse layer does not start at position 0.
        """

        def document(q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
            segments.require_beginning(NAME, first)
            n = q.shape[2]
            if n <= self.whole:
                return causal.sdpa(q, k, v, scaling, 0.0, causal=n > 1)
            # A GPU's kernel skips what is not seen, so there a chunk may be all of a window.
            rows = self.window_tokens if q.is_cuda else None
            sizes = n, n, self.window_tokens, self.sink_tokens
            parts = list(sinks_window.blocks(*sizes, None, None, rows))
            return merge.attend(q, k, v, parts, {}, None, scaling)

        return evicted.attend(
            self, NAME, module, (query, key, value), attention_mask, scaling, dropout, kwargs,
            document,
        )  # fmt: skip


NUMBERS = LongGenWindow
