"""LongGen with strided blocks: most layers see recent blocks, and a strided few of the older ones.

With B tokens a block, query block I and key block J, a sparse layer of key head h sees

    j <= i  and  (I - J < local_blocks  or  (J + h step + offset) mod stride == 0)

J counts from the document's beginning, so a block that left the recent ones and is not on the
stride is never needed again. Heads that share keys share the pattern; others are `step` apart.
Cost: s (local_blocks B + s / (2 stride)) pairs a sparse layer.
Source: Ge et al. 2410.01485 and Lin et al. 2407.17678 (S2-Attention); numbers are ours.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from longctx.attention.method import EvictingMethod, LayerCall
from longctx.attention.ops import causal, full_layers, merge
from longctx.attention.ops.parts import Block, Part
from longctx.errors import UserError

ROWS = 512  # of a chunk, about; fewer where the recent blocks are fewer
CHUNKS = 4  # of a block for `merge.py`


@dataclass(frozen=True)
class LongGenBlocks(EvictingMethod):
    """The numbers of LongGen with strided blocks.

    Args:
        block_size: B, tokens.
        local_blocks: recent blocks that a query sees, its own included.
        stride: of `stride` blocks in a row one stays visible for good.
        offset: added to the block's number; the public code of Phi-3-small has 1.
        heads_share: all heads see the same blocks; else heads are `stride // key_heads` apart.
        full_layers: `hourglass`, the middle third, or a list of layer indices.
        heads: query heads of the model. None: filled in by the model.
        key_heads: key heads of the model. None: filled in by the model.

    Raises:
        UserError: if a number is out of its range, or the layers are no list of indices.
    """

    block_size: int = 64
    local_blocks: int = 16
    stride: int = 128
    offset: int = 0
    heads_share: bool = False
    full_layers: str | Sequence[int] = full_layers.HOURGLASS
    heads: int | None = None
    key_heads: int | None = None

    def __post_init__(self) -> None:
        for name in ("block_size", "local_blocks", "stride"):
            if getattr(self, name) < 1:
                raise UserError(f"attention.{name}={getattr(self, name)} must be at least 1")
        if self.block_size * self.local_blocks < 2:
            raise UserError("attention.block_size x attention.local_blocks must be at least 2")
        if not 0 <= self.offset < self.stride:
            raise UserError(
                f"attention.offset={self.offset} must be from 0 to attention.stride - 1 = "
                f"{self.stride - 1}"
            )
        full_layers.check(self.full_layers)

    def for_layers(self, layers: int, heads: int, key_heads: int) -> "LongGenBlocks":
        """The same with the full layers as a list, and the heads that share a pattern.

        Args:
            layers: of the model.
            heads: query heads.
            key_heads: the heads that share one have one pattern.

        Raises:
            UserError: if a full layer is none of the model's, or the heads are others than given.
        """
        if heads % key_heads:
            raise UserError(
                f"attention {self.name!r} has one pattern a key head, and {key_heads} key heads "
                f"do not divide {heads} heads"
            )
        for name, given, have in (
            ("heads", self.heads, heads),
            ("key_heads", self.key_heads, key_heads),
        ):
            if given not in (None, have):
                raise UserError(f"attention.{name}={given}, and the model has {have}")
        full = full_layers.resolved(self.full_layers, layers)
        return replace(self, full_layers=full, heads=heads, key_heads=key_heads)

    @property
    def whole(self) -> int:
        """See `EvictingMethod.whole`."""
        return self.block_size * self.local_blocks - 1

    @property
    def step(self) -> int:
        """How many blocks apart the patterns of neighbouring key heads are."""
        assert self.key_heads is not None, "for_layers makes the heads"
        return 0 if self.heads_share else max(1, self.stride // self.key_heads)

    def first(self, key_head: Any) -> Any:
        """The first strided block of a key head: a number, or a tensor of them."""
        return (-key_head * self.step - self.offset) % self.stride

    def shrunk(self, layers: int, of_layers: int) -> "LongGenBlocks":
        """Blocks of four tokens, the full layers at the same places; see `Method.shrunk`."""
        return replace(
            self, block_size=4, local_blocks=2, stride=4, offset=self.offset % 4,
            heads=None, key_heads=None,
            full_layers=full_layers.scaled(self.full_layers, layers, of_layers),
        )  # fmt: skip

    def is_full(self, layer: int) -> bool:
        """Whether a layer sees everything."""
        assert not isinstance(self.full_layers, str), "for_layers makes the list"
        return layer in self.full_layers

    def expected_key_heads(self) -> int | None:
        """Key heads of the model; see `Method.expected_key_heads`."""
        return self.key_heads

    def kept_tokens(self, past: int) -> int:
        """Entries a sparse layer holds per key head after `past` tokens; never falls with `past`.

        As many as the head with the most, and as the fullest moment so far: when a block begins,
        the oldest recent one leaves.
        """
        assert self.key_heads is not None
        first = min(self.first(head) for head in range(self.key_heads))
        ended = past // self.block_size * self.block_size - 1  # the last full moment before
        return max(self._held(past, first), self._held(ended, first) if ended > 0 else 0)

    def _held(self, past: int, first: int) -> int:
        """Entries that the next query and later ones need of `past` tokens."""
        block = past // self.block_size
        strided = _count(first, block - self.local_blocks, self.stride)
        local = past - max(0, block - self.local_blocks + 1) * self.block_size
        return strided * self.block_size + local

    def seen(self, past: Tensor, layer: int) -> Tensor:
        """Keys that a query sees, mean over key heads; see `Method.seen`."""
        if self.is_full(layer):
            return past + 1
        assert self.key_heads is not None
        block = past // self.block_size
        local = past + 1 - (block - self.local_blocks + 1).clamp(min=0) * self.block_size
        firsts: Tensor = self.first(torch.arange(self.key_heads, device=past.device))
        last = (block - self.local_blocks)[..., None]
        strided = ((last - firsts) // self.stride + 1).clamp(min=0).double().mean(-1)
        return local + strided * self.block_size

    def kept_positions(self, past: Tensor, key_heads: Tensor) -> Tensor:
        """Positions of those entries, `[b h|1 K]`; see `EvictingMethod`."""
        size, kept = self.block_size, self.kept_tokens(int(past.max()))
        past = past[:, None, None]
        first = self.first(key_heads[: 1 if self.heads_share else None])[None, :, None]
        block = past // size
        strided = ((block - self.local_blocks - first) // self.stride + 1).clamp(min=0) * size
        local = (block - self.local_blocks + 1).clamp(min=0) * size
        index = torch.arange(kept, device=past.device) - (kept - strided - (past - local))
        far = (first + index // size * self.stride) * size + index % size
        return torch.where(index < strided, far, local + index - strided).masked_fill(index < 0, -1)

    def sees(self, i: Tensor, j: Tensor, key_heads: Tensor) -> Tensor:
        """Which pairs attend in a sparse layer."""
        query, block = i // self.block_size, j // self.block_size
        strided = (block + key_heads * self.step + self.offset) % self.stride == 0
        return (j <= i) & ((query - block < self.local_blocks) | strided)

    def definition(self, i: Tensor, j: Tensor, layer: int, head: Tensor) -> tuple[Tensor, Tensor]:
        """Which pairs attend, and at which rotary distance; see `Method.definition`."""
        assert self.heads is not None
        assert self.key_heads is not None
        key_head = head // (self.heads // self.key_heads)
        return j <= i if self.is_full(layer) else self.sees(i, j, key_head), i - j

    def document(self, q: Tensor, k: Tensor, v: Tensor, first: int, call: LayerCall) -> Tensor:
        """The fast path of one document of a sparse layer; see `Method.document`."""
        n = q.shape[2]
        if n <= self.local_blocks * self.block_size:
            return causal.sdpa(q, k, v, call.scaling, 0.0, causal=n > 1)
        firsts = [self.first(head) for head in call.key_heads]
        k, v = (self._with_strided(x, firsts) for x in (k, v))
        return merge.attend(q, k, v, list(self._blocks(n, firsts)), {}, None, call.scaling)

    def _with_strided(self, x: Tensor, firsts: list[int]) -> Tensor:
        """`x` `[b hk n d]`, and after it each head's strided blocks that leave the recent ones."""
        n, size = x.shape[2], self.block_size
        last = (n - 1) // size - self.local_blocks
        most = max(_count(first, last, self.stride) for first in firsts)
        if not most:
            return x
        index = torch.tensor([[first + t * self.stride for t in range(most)] for first in firsts])
        index = index.clamp(max=last).to(x.device)  # a head with one less gets any, never used
        blocks = x[:, :, : n // size * size].unflatten(2, (-1, size))
        heads = torch.arange(len(firsts), device=x.device)[:, None]
        return torch.cat((x, blocks[:, heads, index].flatten(2, 3)), dim=2)

    def _blocks(self, n: int, firsts: list[int]) -> Iterator[Block]:
        """Query rows of a document of n tokens with their parts; strided keys stand from n on."""
        size, window = self.block_size, (self.local_blocks - 1) * self.block_size
        stop = self.local_blocks * size
        yield Block(0, stop, [Part(0, stop, causal=True)])
        while stop < n:
            row, rest = stop, n - stop
            chunk = min(rest, size)  # the last block may be short
            while size <= chunk and 2 * chunk <= min(rest, ROWS, window):
                chunk *= 2
            stop = row + min(CHUNKS, rest // chunk) * chunk
            parts = [*_recent(row, stop, chunk, window, size), *self._strided(row, stop, n, firsts)]
            yield Block(row, stop, parts)

    def _strided(self, row: int, stop: int, n: int, firsts: list[int]) -> Iterator[Part]:
        """Blocks that left the recent ones before these rows, and those that leave in them."""
        size, local = self.block_size, self.local_blocks
        before, after = row // size - local, (stop - 1) // size - local
        for count, heads in _runs([_count(r, before, self.stride) for r in firsts]):
            yield Part(n, n + count * size, heads=heads)
        for block in range(before + 1, after + 1):
            slots = [divmod(block - r, self.stride) for r in firsts]
            for (slot, rest), heads in _runs(slots):
                if slot >= 0 and not rest:
                    rows = ((block + local) * size - row, stop - row)
                    yield Part(n + slot * size, n + (slot + 1) * size, rows=rows, heads=heads)


def _count(first: int, last: int, stride: int) -> int:
    """How many of first, first + stride, ... are at most `last`."""
    return max(0, (last - first) // stride + 1)


def _runs(keys: list[Any]) -> Iterator[tuple[Any, tuple[int, int]]]:
    """Neighbours that are equal: (what, (first, one past the last))."""
    for key, run in groupby(enumerate(keys), key=lambda pair: pair[1]):
        members = [index for index, _ in run]
        yield key, (members[0], members[-1] + 1)


def _recent(row: int, stop: int, chunk: int, window: int, size: int) -> Iterator[Part]:
    """Recent blocks of rows that are whole chunks; all but a query's own block make up `window`.

    Of its own chunk a query sees what is causal. Of the chunk that begins `window` before, it sees
    the blocks from its own block's number on: halves of halves, and in the end single blocks.
    """
    yield Part(row, stop, causal=True, fold=chunk)
    if chunk < size:  # the rest of a document
        yield Part(row - window, row)
    elif window:
        fold = chunk
        while fold > size:
            yield Part(row - window, stop - window, fold=fold, half=True, flipped=True)
            fold //= 2
        yield Part(row - window, stop - window, fold=size)
        for start in range(row, stop, chunk):
            yield Part(start + chunk - window, start, rows=(start - row, start - row + chunk))
