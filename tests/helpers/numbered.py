"""A corpus whose token `n` is the number `n`: what a loader gives then says where it came from."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from longctx.config import DataConfig
from longctx.data.loader import RowLoader, packed


class Numbered:
    """Documents in memory, with the interface of a store; tokens count on from `first`."""

    def __init__(self, lengths: Sequence[int], first: int = 0) -> None:
        ends = first + np.cumsum(lengths)
        self.texts = [np.arange(e - n, e) for n, e in zip(lengths, ends, strict=True)]
        self.lengths = np.array(lengths, dtype=np.int64)
        self.meta: dict[str, Any] = {"digest": str(list(lengths))}

    def tokens(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.texts[i][start:stop]


def stores(*lengths: Sequence[int]) -> list[Numbered]:
    """One store per list; the tokens of each count on from those before it."""
    firsts = np.cumsum([0, *(sum(n) for n in lengths)]).tolist()
    return [Numbered(n, first) for n, first in zip(lengths, firsts, strict=False)]


def loader(
    *lengths: Sequence[int],
    seq_len: int = 16,
    packing: str = "best_fit",
    mask: bool = True,
    rows: int = 4,
    micro: int = 1,
    seed: int = 3,
    **data: Any,
) -> RowLoader:
    """A loader over numbered tokens; each list of lengths is a store."""
    names = [f"store{i}" for i in range(len(lengths))]
    config = DataConfig(names, [], seq_len, packing, mask, **data)
    return packed(stores(*lengths), config, batch_rows=rows, micro_batch_rows=micro, seed=seed)
