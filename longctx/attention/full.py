"""Full causal attention: every token attends to all earlier tokens of its document.

Cost: s(s+1)/2 pairs per head and document, keys and values of all tokens in the cache.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from longctx.attention.method import Method


@dataclass(frozen=True)
class Full(Method):
    """Full causal attention has no numbers, and every layer is `is_full`."""

    plain: ClassVar[bool] = True

    def definition(self, i: Tensor, j: Tensor, layer: int, head: Tensor) -> tuple[Tensor, Tensor]:
        """Which pairs attend, and at which rotary distance; see `Method.definition`."""
        return j <= i, i - j

    def is_full(self, layer: int) -> bool:
        """Every layer is."""
        return True
