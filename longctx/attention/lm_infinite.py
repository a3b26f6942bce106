"""LM-Infinite: a Lambda-shaped mask and a cap on distances.

A query sees the first G tokens and the last W = the trained window. Inside the window distances are
true; the first tokens beyond it are all met at distance W: queries turned to position W, keys to 0.
Cost: s (G + W) pairs. The cache keeps every key.
Source: Han et al. 2308.16137, section 4.1, and its code for the position of the first tokens.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from longctx.attention.ops import causal, segments, sinks_window
from longctx.attention.ops.merge import attend
from longctx.errors import UserError

NAME = "lm_infinite"


@dataclass(frozen=True)
class LmInfinite:
    """The numbers of LM-Infinite.

    Args:
        first: G, first tokens that every query sees; the paper's 10 to 100, its code's 10.
        window: W, recent tokens that a query sees, itself included. None: the model's window.

    Raises:
        UserError: if a number is too small.
    """

    turns_queries: ClassVar[bool] = True  # attend needs the rotary module

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

    @property
    def _window(self) -> int:
        assert self.window is not None, "for_window makes the numbers"
        return self.window

    def definition(self, i: Tensor, j: Tensor, layer: int, head: Tensor) -> tuple[Tensor, Tensor]:
        """Which pairs attend, and at which rotary distance; see `Full.definition`."""
        near = i - j < self._window
        return (j <= i) & (near | (j < self.first)), torch.clamp(i - j, max=self._window)

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
                document does not start at position 0.
        """
        rotary: Any = module.rotary

        def document(q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
            segments.require_beginning(NAME, first)
            m, n = q.shape[2], k.shape[2]
            turns = {
                "cap": self._window - torch.arange(n - m, n, device=q.device),
                "zero": -torch.arange(n, device=q.device),
            }
            parts = list(sinks_window.blocks(m, n, self._window, self.first, "cap", "zero"))
            return attend(q, k, v, parts, turns, rotary.inv_freq, scaling)

        return causal.by_documents(
            NAME, module, query, key, value, attention_mask, dropout, kwargs, document
        )


NUMBERS = LmInfinite
