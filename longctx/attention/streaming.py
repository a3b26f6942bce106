"""StreamingLLM: attention sinks and a recent window, at positions inside the cache.

A query sees the first S tokens and the last W. Positions are counted in that cache, not in the
text: a sink stays at distance `S + W - 1 - j` however far the text runs, so no distance is new to
the model. What falls out of the window is forgotten; the window does not become longer.
Cost: s (S + W) pairs. The cache here still keeps every key; evicting them would change no result.
Source: Xiao et al. 2309.17453, section 3.2.
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
class Streaming(Method):
    """The numbers of StreamingLLM.

    Args:
        sinks: S, first tokens that every query sees; the paper's 4.
        window: W, recent tokens that a query sees, itself included. None: the model's window less
            the sinks.

    Raises:
        UserError: if a number is too small.
    """

    turns_queries: ClassVar[bool] = True
    from_beginning: ClassVar[bool] = True

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

    def shrunk(self, layers: int, of_layers: int) -> "Streaming":
        """Two sinks, and a window from the tiny model's; see `Method.shrunk`."""
        return replace(self, sinks=2, window=None)

    @property
    def _window(self) -> int:
        assert self.window is not None, "for_window makes the numbers"
        return self.window

    def definition(self, i: Tensor, j: Tensor, layer: int, head: Tensor) -> tuple[Tensor, Tensor]:
        """Which pairs attend, and at which rotary distance; see `Method.definition`."""
        near = i - j < self._window
        newest = torch.full_like(i, self.sinks + self._window - 1)
        distance = torch.where(near, i - j, torch.minimum(i, newest) - j)
        return (j <= i) & (near | (j < self.sinks)), distance

    def document(self, q: Tensor, k: Tensor, v: Tensor, first: int, call: LayerCall) -> Tensor:
        """The fast path of one document; see `Method.document`."""
        m, n = q.shape[2], k.shape[2]
        newest = self.sinks + self._window - 1
        turns = {"sinks": (newest - torch.arange(n - m, n, device=q.device)).clamp(max=0)}
        blocks = list(sinks_window.blocks(m, n, self._window, self.sinks, "sinks", None))
        return attend(q, k, v, blocks, turns, call.inv_freq, call.scaling)

    def seen(self, past: Tensor, layer: int) -> Tensor:
        """Keys that a query sees; see `Method.seen`."""
        return (past + 1).clamp(max=self.sinks + self._window)
