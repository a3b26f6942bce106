"""Dual Chunk Attention: a longer window without training, with positions from the trained one.

A document is cut into chunks of s tokens and a key keeps its position inside its chunk, `j mod s`.
A query meets its own chunk at its own position (intra), the chunk before at `s + p` up to c - 1
(succ), and all older chunks at c - 1 (inter); one softmax over the three.
Cost: the pairs of full attention, once each, in three or four flash calls for each `ROWS` tokens;
queries are rotated two times more. The cache holds every key, rotated once, and never changes.
Source: An et al. 2402.17463, sections 3.1-3.4.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from longctx.attention.method import LayerCall, Method
from longctx.attention.ops.merge import attend
from longctx.attention.ops.parts import Block, Part
from longctx.errors import UserError

PRESETS = ("paper", "reference_code")
ROWS = 1024  # of a block at most: what is held beside the operands is a few blocks of queries
INTRA, INTER, ALL = "intra", "intra+inter", "intra+inter+succ"


@dataclass(frozen=True)
class DualChunk(Method):
    """The numbers of Dual Chunk Attention; those not given follow from the model's window L.

    Args:
        chunk_len: s, tokens in a chunk; a key's position is `j mod s`.
        local_window: w, tokens of a chunk that see the chunk before at their exact distance.
        max_positions: c; distances stay below it.
        preset: where the numbers that are not given come from: `paper` (section 4.1) c = L,
            s = 3L/4, w = c - s; `reference_code` (its defaults) w = L/8, s = 3L/4 - w,
            c = 3L/4 + 1.
        length_temperature: a; scores of a query at position i are multiplied by
            `(a ln((i + 1) / c) + 1)^2` beyond c. 0: off, as in the paper. The reference code
            has it with a = 0.05 or 0.1 and the length of the whole input in place of i + 1, so that
            a cached key would have to change; by position, decoding equals prefill.
        parts: `intra+inter+succ`, or the paper's ablations: `intra` sees its own chunk only,
            `intra+inter` meets the chunk before as it does older ones.

    Raises:
        UserError: if the numbers do not fit together.
    """

    turns_queries: ClassVar[bool] = True

    chunk_len: int | None = None
    local_window: int | None = None
    max_positions: int | None = None
    preset: str = "paper"
    length_temperature: float = 0.0
    parts: str = ALL

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise UserError(f"attention.preset={self.preset!r} is not one of {', '.join(PRESETS)}")
        if self.parts not in (INTRA, INTER, ALL):
            names = ", ".join((INTRA, INTER, ALL))
            raise UserError(f"attention.parts={self.parts!r} is not one of {names}")
        for name in ("chunk_len", "local_window", "max_positions"):
            given = getattr(self, name)
            if given is not None and given < 1:
                raise UserError(f"attention.{name}={given} must be at least 1")
        if not self.length_temperature >= 0:
            raise UserError(
                f"attention.length_temperature={self.length_temperature} must be 0 or above"
            )
        if self.chunk_len is None or self.local_window is None or self.max_positions is None:
            return
        if self.chunk_len >= self.max_positions:
            raise UserError(
                f"attention.chunk_len={self.chunk_len} must be below "
                f"attention.max_positions={self.max_positions}"
            )
        if self.chunk_len + self.local_window > self.max_positions:
            raise UserError(
                f"attention.chunk_len={self.chunk_len} and attention.local_window="
                f"{self.local_window} reach beyond attention.max_positions={self.max_positions}"
            )

    def for_window(self, window: int) -> "DualChunk":
        """The same with every number given.

        Args:
            window: L, the positions that the model was trained on (or scaled to), tokens.

        Raises:
            UserError: if the numbers do not fit together or do not fit into the window.
        """
        paper = self.preset == "paper"
        local = self.local_window or (None if paper else max(1, window // 8))
        c = self.max_positions or (window if paper else 3 * window // 4 + 1)
        s = self.chunk_len or (3 * window // 4 if paper else 3 * window // 4 - (local or 0))
        if c > window:
            raise UserError(
                f"attention.max_positions={c} is beyond the model's window of {window} tokens"
            )
        return replace(self, chunk_len=s, max_positions=c, local_window=local or max(1, c - s))

    def shrunk(self, layers: int, of_layers: int) -> "DualChunk":
        """The sizes that follow from the tiny model's window; see `Method.shrunk`."""
        return replace(self, chunk_len=None, local_window=None, max_positions=None)

    def key_positions(self, positions: Tensor) -> Tensor:
        """Where keys (and queries, before their turns) are rotated to: `j mod s`."""
        return positions % self._s

    @property
    def _s(self) -> int:
        assert self.chunk_len is not None, "for_window makes the numbers"
        return self.chunk_len

    def _succ(self, inside: Tensor) -> Tensor:
        """Position at which a query meets the chunk before its own."""
        assert self.local_window is not None and self.max_positions is not None
        last = torch.full_like(inside, self.max_positions - 1)
        return torch.where(inside < self.local_window, self._s + inside, last)

    def definition(self, i: Tensor, j: Tensor, layer: int, head: Tensor) -> tuple[Tensor, Tensor]:
        """Which pairs attend, and at which rotary distance; see `Method.definition`.

        Source: 2402.17463, eq. 4, 6 and 8.
        """
        assert self.max_positions is not None
        inside, chunks = i % self._s, i // self._s - j // self._s
        older = torch.full_like(inside, self.max_positions - 1)
        before = self._succ(inside) if self.parts == ALL else older
        at = torch.where(chunks == 0, inside, torch.where(chunks == 1, before, older))
        live = j <= i if self.parts != INTRA else (j <= i) & (chunks == 0)
        return live, at - j % self._s

    def document(self, q: Tensor, k: Tensor, v: Tensor, first: int, call: LayerCall) -> Tensor:
        """The fast path of one document; see `Method.document`."""
        assert self.max_positions is not None
        m, n = q.shape[2], k.shape[2]
        at = torch.arange(first + n - m, first + n, device=q.device)
        if self.length_temperature:
            over = ((at + 1).double() / self.max_positions).clamp(min=1).log()
            factor = (self.length_temperature * over + 1) ** 2
            q = (q * factor[:, None]).to(q.dtype)
        inside = at % self._s
        turns = {"succ": self._succ(inside) - inside, "inter": self.max_positions - 1 - inside}
        blocks = list(self._blocks(m, n, first))
        return attend(q, k, v, blocks, turns, call.inv_freq, call.scaling)

    def _blocks(self, m: int, n: int, first: int) -> Iterator[Block]:
        """The last m of n tokens, a chunk or less at a time, with their keys; indices from 0."""
        row = n - m
        while row < n:
            chunk = (first + row) // self._s
            rest = min((chunk + 1) * self._s - first, n) - row
            stop = row + math.ceil(rest / math.ceil(rest / ROWS))  # alike, and none too short
            own, before = (max(x * self._s - first, 0) for x in (chunk, chunk - 1))
            # After its own: earlier tokens of the chunk, in a block before or from a cache.
            parts = [Part(row, stop, causal=True), Part(own, row)]
            if self.parts == ALL:
                parts.append(Part(before, own, "succ"))
            parts.append(Part(0, {ALL: before, INTER: own, INTRA: 0}[self.parts], "inter"))
            yield Block(row - (n - m), stop - (n - m), parts)
            row = stop

    def seen(self, past: Tensor, layer: int) -> Tensor:
        """Keys that a query sees; see `Method.seen`."""
        return past % self._s + 1 if self.parts == INTRA else past + 1
