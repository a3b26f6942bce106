"""What one forward pass adds to a cache that evicts, and what it drops, for all layers at once.

A token's place is its count among the real tokens of its row, whatever padding stands where. All is
worked out on the CPU: an unpadded call waits for no device, a padded one once. Costs some integer
operations on the places of held and new tokens.
"""

from typing import Any

import torch
from torch import Tensor

from longctx.attention.ops.segments import RESTART
from longctx.errors import UserError


class Call:
    """What one forward pass does to the kept layers; all of them share it.

    Args:
        method: the attention, with `kept_tokens` and `kept_positions`.
        columns: tokens a row before this call, padding and evicted ones included.
        new: s.
        padding: `[b columns+s]`, True or 1 on real tokens; None: all are real.
        positions: `[b s]` or `[1 s]`, of the new tokens; None: not checked.

    Raises:
        UserError: if the padding mask has another length, or new tokens do not continue their row.
    """

    def __init__(
        self,
        method: Any,
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
        if self.new != 1 or not hasattr(self.method, "ring"):
            return None
        sinks, window = self.method.ring()
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


def consecutive(count: int, padded: int = 0) -> Tensor:
    """`Call.seen_before` `[1 2]` of `count` columns of which the first `padded` are padding."""
    total = count * (count - 1) // 2 - padded * (padded - 1) // 2
    return torch.tensor([[count - padded, total]])


def _sums(real: Tensor, first: int) -> Tensor:
    """Number of real columns and sum of their indices, `[b 2]`; column 0 has the index `first`."""
    index = torch.arange(first, first + real.shape[1], device=real.device)
    return torch.stack((real.sum(1), (real * index).sum(1)), dim=1)
