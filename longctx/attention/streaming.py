"""StreamingLLM: attention sinks and a recent window, at positions inside the cache.

A query sees the first S tokens and the last W. Positions are counted in that cache, not in the
text: a sink stays at distance `S + W - 1 - j` however far the text runs, so no distance is new to
the model. What falls out of the window is forgotten; the window does not become longer.
Cost: s (S + W) pairs. The cache here still keeps every key; evicting them would change no result.
Source: Xiao et al. 2309.17453, section 3.2.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from longctx.attention.ops import causal, segments, sinks_window
from longctx.attention.ops.merge import attend
from longctx.errors import UserError

NAME = "streaming"


@dataclass(frozen=True)
class Streaming:
    """The numbers of StreamingLLM.

    Args:
        sinks: S, first tokens that every query sees; the paper's 4.
        window: W, recent tokens that a query sees, itself included. None: the model's window less
            the sinks.

    Raises:
        UserError: if a number is too small.
    """

    turns_queries: ClassVar[bool] = True  # attend needs the rotary module

    sinks: int = 4
    window: int | None = None

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise UserError(f"attention.sinks={self.sinks} must be at least 0")
        if self.window is not None and self.window < 1:
            raise UserError(f"attention.window={self.window} must be at least 1")

    def for_window(self, window: int) -> "Streaming":
        """The same with every number given; sinks and window fill the model's window.

        Raises:
            UserError: if they do not fit into it.
        """
        chosen = Streaming(self.sinks, self.window or window - self.sinks)
        if self.sinks + chosen._window > window:
            raise UserError(
                f"attention.sinks={self.sinks} and attention.window={chosen._window} reach beyond "
                f"the model's window of {window} tokens"
            )
        return chosen

    @property
    def _window(self) -> int:
        assert self.window is not None, "for_window makes the numbers"
        return self.window

    def definition(self, i: Tensor, j: Tensor, layer: int, head: Tensor) -> tuple[Tensor, Tensor]:
        """Which pairs attend, and at which rotary distance; see `Full.definition`."""
        near = i - j < self._window
        newest = torch.full_like(i, self.sinks + self._window - 1)
        distance = torch.where(near, i - j, torch.minimum(i, newest) - j)
        return (j <= i) & (near | (j < self.sinks)), distance

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
            newest = self.sinks + self._window - 1
            turns = {"sinks": (newest - torch.arange(n - m, n, device=q.device)).clamp(max=0)}
            parts = list(sinks_window.blocks(m, n, self._window, self.sinks, "sinks", None))
            return attend(q, k, v, parts, turns, rotary.inv_freq, scaling)

        return causal.by_documents(
            NAME, module, query, key, value, attention_mask, dropout, kwargs, document
        )


NUMBERS = Streaming
