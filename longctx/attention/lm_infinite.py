"""LM-Infinite: a Lambda-shaped mask and a cap on distances.

A query sees the first G tokens and the last W = the trained window. Inside the window distances are
true; the first tokens beyond it are all met at distance W: queries turned to position W, keys to 0.
Cost: s (G + W) pairs. The cache keeps every key.
Source: Han et al. 2308.16137, section 4.1, and its code for the position of the first tokens.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from longctx.attention.method import LayerCall, Method
from longctx.attention.ops import sinks_window
from longctx.attention.ops.merge import attend
from longctx.errors import UserError


@dataclass(frozen=True)
class LmInfinite(Method):
    """The numbers of LM-Infinite.

    Args:
        first: G, first tokens that every query sees; the paper's 10 to 100, its code's 10.
        window: W, recent tokens that a query sees, itself included. None: the model's window.

    Raises:
        UserError: if a number is too small.
    """

    turns_queries: ClassVar[bool] = True
    from_beginning: ClassVar[bool] = True

    first: int = 10
    window: int | None = None

    def __post_init__(self) -> None:
        if self.first < 0:
            raise UserError(f"attention.first={self.first} must be at least 0")
        if self.window is not None and self.window < 1:
            raise UserError(f"attention.window={self.window} must be at least 1")

    def for_window(self, window: int) -> "LmInfinite":
        """The same with every number given.

        Raises:
            UserError: if the window is beyond the model's.
        """
        if self.window is not None and self.window > window:
            raise UserError(
                f"attention.window={self.window} is beyond the model's window of {window} tokens"
            )
        return LmInfinite(self.first, self.window or window)

    def shrunk(self, layers: int, of_layers: int) -> "LmInfinite":
        """Two first tokens and the window of the tiny model; see `Method.shrunk`."""
        return replace(self, first=2, window=None)

    @property
    def _window(self) -> int:
        assert self.window is not None, "for_window makes the numbers"
        return self.window

    def definition(self, i: Tensor, j: Tensor, layer: int, head: Tensor) -> tuple[Tensor, Tensor]:
        """Which pairs attend, and at which rotary distance; see `Method.definition`."""
        near = i - j < self._window
        return (j <= i) & (near | (j < self.first)), torch.clamp(i - j, max=self._window)

    def document(self, q: Tensor, k: Tensor, v: Tensor, first: int, call: LayerCall) -> Tensor:
        """The fast path of one document; see `Method.document`."""
        m, n = q.shape[2], k.shape[2]
        turns = {
            "cap": self._window - torch.arange(n - m, n, device=q.device),
            "zero": -torch.arange(n, device=q.device),
        }
        blocks = list(sinks_window.blocks(m, n, self._window, self.first, "cap", "zero"))
        return attend(q, k, v, blocks, turns, call.inv_freq, call.scaling)

    def seen(self, past: Tensor, layer: int) -> Tensor:
        """Keys that a query sees; see `Method.seen`."""
        return (past + 1).clamp(max=self.first + self._window)
