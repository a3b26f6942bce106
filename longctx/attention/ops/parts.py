"""How attention is cut: blocks of query rows, and the slices of keys that they see.

A part is one kernel call. Where the rows of a block see keys by the same rule again and again, the
part is folded: its pieces are rows of a batch, so one call does them all. Costs integers and views.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LEAF = 128  # keys of a causal piece on the CPU, whose kernel scores the other half of them too
SLAB = 1024  # keys whose gradients one backward call makes: what a part holds, whatever its length


@dataclass(frozen=True)
class Part:
    """A slice of keys for the rows of a block.

    Args:
        start: first key.
        stop: one past the last key.
        turn: name of the rotation that the queries get, a key of `turns`; None: as they are.
        causal: as many keys as rows, and row r sees those up to `start + r`; else all of them.
        flipped: with `causal`, row r sees those from `start + r` on.
        key_turn: name of the rotation that the keys get, a key of `turns`; None: as they are.
        rows: of the block, counted in it; None: all.
        heads: key heads, with the query heads that share them; None: all.
        fold: as many keys as rows, both cut into pieces of this many, and each piece of rows sees
            its own piece of keys alone, `causal` or all of it; without turns.
        half: with `fold`, the second half of each piece of rows sees the first half of its keys, or
            if `flipped` the first half sees the second; never `causal`.
    """

    start: int
    stop: int
    turn: str | None = None
    causal: bool = False
    flipped: bool = False
    key_turn: str | None = None
    rows: tuple[int, int] | None = None
    heads: tuple[int, int] | None = None
    fold: int | None = None
    half: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether it has no keys, or names no rows or no heads."""
        ranges = ((self.start, self.stop), self.rows or (0, 1), self.heads or (0, 1))
        return any(first >= last for first, last in ranges)

    def of(self, block: "Block", groups: int) -> tuple[slice, slice, slice]:
        """Its query heads and key heads, and its rows among those of the call.

        Args:
            block: whose rows it is for.
            groups: query heads a key head.
        """
        low, high = self.rows or (0, block.stop - block.start)
        rows = slice(block.start + low, block.start + high)
        if self.heads is None:
            return slice(None), slice(None), rows
        first, last = self.heads
        return slice(first * groups, last * groups), slice(first, last), rows

    def own(self, x: Tensor, keys: bool = False) -> Tensor:
        """Of `x` `[b h n ...]` what the part reads or adds to, as a view.

        Args:
            x: its rows or its keys.
            keys: whether they are its keys.

        Returns:
            `[b h n ...]`, or `[b h pieces rows ...]` if folded.
        """
        if self.fold is None:
            return x
        x = x.unflatten(2, (-1, self.fold))
        if not self.half:
            return x
        return x.narrow(3, self.fold // 2 if keys == self.flipped else 0, self.fold // 2)

    def cut(self, x: Tensor, keys: bool = False) -> Tensor:
        """`own` as the kernel gets it: pieces as rows of the batch, reversed where flipped."""
        x = self.own(x, keys)
        x = x if self.fold is None else x.transpose(1, 2).flatten(0, 1)
        return _reversed(x) if self.causal and self.flipped else x

    def back(self, x: Tensor, b: int) -> Tensor:
        """What the kernel gives for `b` rows of a batch, laid out as `own`."""
        x = _reversed(x) if self.causal and self.flipped else x
        return x if self.fold is None else x.unflatten(0, (b, -1)).transpose(1, 2)

    def slabs(self) -> list[slice]:
        """Its keys in slices of `SLAB` at most; a causal or folded part is one slice."""
        whole = self.causal or self.fold is not None
        step = max(1, self.stop - self.start if whole else SLAB)
        return [slice(i, min(i + step, self.stop)) for i in range(self.start, self.stop, step)]

    def leaves(self) -> "list[Part]":
        """A causal part in pieces of `LEAF` at most, and in parts that are not causal."""
        count, low = self.stop - self.start, self.rows[0] if self.rows else 0
        size = count if self.fold is None else self.fold
        if not self.causal or size <= LEAF or self.turn or self.key_turn:
            return [self]
        if self.fold is not None:
            if size % 2:
                return [self]
            return [
                replace(self, causal=False, half=True),
                *replace(self, fold=size // 2).leaves(),
            ]
        even = LEAF << ((count // LEAF).bit_length() - 1)  # the most that halves down to a leaf
        rows, middle = (low, low + even), self.start + even
        found = replace(self, stop=middle, rows=rows, fold=even).leaves()
        if even < count:
            rest = (low + even, low + count)
            found += replace(self, start=middle, rows=rest).leaves()
            rect = replace(self, causal=False, flipped=False)
            found.append(
                replace(rect, start=middle, rows=rows)
                if self.flipped
                else replace(rect, stop=middle, rows=rest)
            )
        return found


@dataclass(frozen=True)
class Block:
    """Query rows `start:stop` and the parts that they see, together every key once.

    A part without keys, rows or heads is left out: a kernel must not be called with nothing.
    """

    start: int
    stop: int
    parts: Sequence[Part]

    def __post_init__(self) -> None:
        rows = self.stop - self.start
        kept = [part for part in self.parts if rows > 0 and not part.is_empty]
        object.__setattr__(self, "parts", kept)

    def leaves(self) -> "Block":
        """The same for the CPU, whose kernel saves nothing inside a causal call of 512 keys."""
        return replace(self, parts=[leaf for part in self.parts for leaf in part.leaves()])


def _reversed(x: Tensor) -> Tensor:
    """`x.flip(2)`, copying whole rows: several times faster."""
    return x.index_select(2, torch.arange(x.shape[2] - 1, -1, -1, device=x.device))
