"""Perplexity by `whole_window`: a window starts every S tokens of all text, and all of it counts.

The documents are one stream; windows cross their borders, the last partial one is dropped, and the
loss is the mean over windows of the mean over their W - 1 targets. Early targets see little, so it
lies above `sliding_new_tokens` at the same W: it is the number that LongLoRA's, ChunkLlama's and
LCEG's scripts call perplexity with a sliding window of 256. One forward of W tokens per stride;
a sum is kept of each window.
Source: LongLoRA (2309.12307) and DCA (2402.17463), their evaluation code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from longctx.eval.perplexity import Text
from longctx.eval.windows import Documents, Window, mean_of, sum_windows


@dataclass(frozen=True)
class Stream:
    """The first tokens of some documents, one behind the other, read like a store of one.

    Args:
        documents: the store.
        chosen: indices of its documents.
        taken: how many tokens of each.
    """

    documents: Documents
    chosen: Sequence[int]
    taken: Sequence[int]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """`[1]` all tokens."""
        return np.array([sum(self.taken)])

    @property
    def ends(self) -> list[int]:
        """Where each document ends in the stream."""
        return list(accumulate(self.taken))

    def tokens(self, i: int, start: int = 0, stop: int | None = None) -> NDArray[np.integer[Any]]:
        """Tokens `start:stop` of the stream."""
        stop = int(self.lengths[0]) if stop is None else stop
        parts = []
        for document, taken, end in zip(self.chosen, self.taken, self.ends, strict=True):
            first, last = max(start - end + taken, 0), min(stop - end + taken, taken)
            if first < last:
                parts.append(self.documents.tokens(document, first, last))
        return np.concatenate(parts)


def whole_window(
    model: nn.Module,
    text: Text,
    lengths: Sequence[int],
    stride: int,
    document_tokens: int | None,
) -> dict[str, Any]:
    """Perplexity over whole windows, one row per window width.

    Args:
        model: see `longctx.eval.score.token_nll`.
        text: the documents.
        lengths: window widths W, tokens.
        stride: S, tokens.
        document_tokens: documents are cut to so many, but never below the widest window; None:
            whole documents.

    Returns:
        Rows of equally many tokens a window, so the mean over tokens is the mean of means; the
        error is over documents, by where a window starts.

    Raises:
        UserError: if a loss is not finite.
    """
    limit = None if document_tokens is None else max(document_tokens, *lengths)
    whole = [int(text.documents.lengths[i]) for i in text.chosen]
    stream = Stream(text.documents, text.chosen, [min(n, limit or n) for n in whole])
    ends, rows = np.array(stream.ends), []
    for length in lengths:
        starts = range(0, int(stream.lengths[0]) - length + 1, stride)
        plan = [Window(0, start, start + length, start + 1) for start in starts]
        title = f"whole window {length}, sums"
        batch, journal = text.batch_tokens, text.journal
        sums = sum_windows(model, stream, plan, batch, title, journal)
        owners = np.searchsorted(ends, np.array(starts), side="right").tolist()
        mean = mean_of(owners, sums, [length - 1] * len(plan))
        rows.append({"length": length, "windows": len(plan), **mean.row()})
    return {"stride": stride, "document_tokens": limit, "rows": rows}
