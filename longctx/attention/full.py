"""Full causal attention: every token attends to all earlier tokens of its document.

Cost: s(s+1)/2 pairs per head and document, keys and values of all tokens in the cache.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from longctx.attention.ops import causal

NAME = "full"


@dataclass(frozen=True)
class Full:
    """Full causal attention has no numbers."""

    def definition(self, i: Tensor, j: Tensor, layer: int, head: Tensor) -> tuple[Tensor, Tensor]:
        """Which pairs attend, and at which rotary distance.

        Args:
            i: query positions inside their document.
            j: key positions inside their document; broadcasts with `i`.
            layer: layer index; all layers are alike.
            head: query head indices; all heads are alike.

        Returns:
            (live bool, distance int64), broadcast over `i` and `j`.
        """
        return j <= i, i - j

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
        """The fast path, with transformers' attention-interface signature.

        Args:
            module: the attention layer that calls.
            query: `[b hq s d]`, rotated.
            key: `[b hk n d]`, rotated, cached keys first.
            value: `[b hk n d]`.
            attention_mask: `[b n]`, True on real tokens, or None.
            scaling: factor on the scores; None: d ** -0.5.
            dropout: probability of dropping an attention weight.
            **kwargs: must hold `position_ids` `[b s]`, whose zeros start documents.

        Returns:
            `[b s hq d]`, and None for the weights.

        Raises:
            UserError: if a mask or argument asks for something that would not be honoured.
        """
        positions = causal.check_interface(NAME, module, attention_mask, kwargs)
        padding = None if attention_mask is None else attention_mask.bool()
        first = getattr(module, "layer_idx", 0) in (0, None)
        out = causal.causal_in_segments(
            query, key, value, positions, padding, scaling, dropout, first
        )
        return out, None


NUMBERS = Full
