"""Windows for an encoder beside a decoder: P context tokens, then D decoder tokens, in steps of D.

So the decoder segments tile the text from token P on, and a window's context is the decoder text
of earlier ones. Pure functions of document lengths, 12 bytes a piece and 8 a window.
Source: CEPE (2402.16617) and its data scripts: windows inside long documents ("filter") and over
the joined stream of all documents ("concat"), drawn 2:1; warm-up windows repeat the decoder's own
tokens in the encoder.
"""

from dataclasses import dataclass, replace

import numpy as np

from longctx.data.corpus import Corpus, Ints, Row, Rows, smallest
from longctx.errors import UserError


@dataclass(frozen=True)
class Windows:
    """Windows, each the pieces of one row: its first P tokens are context, its last D decoded.

    Args:
        rows: where the tokens of each window are; P + D of them, or D = P of a warm-up window.
        context: P, tokens.
        decoder: D, tokens.
    """

    rows: Rows
    context: int
    decoder: int

    def __len__(self) -> int:
        return len(self.rows)


def in_documents(lengths: Ints, context: int, decoder: int) -> Windows:
    """Windows inside documents: `floor((L - P) / D)` of each that has at least P + D tokens.

    Args:
        lengths: `[documents]` tokens in each.
        context: P, tokens; 0: only the tiling, for `warm_up`.
        decoder: D, tokens.
    """
    kept = np.maximum((lengths - context) // decoder, 0)
    document = smallest(np.repeat(np.arange(len(lengths)), kept))
    number = np.arange(len(document)) - np.repeat(np.cumsum(kept) - kept, kept)
    return Windows(
        rows=Rows(
            offsets=np.arange(len(document) + 1),
            document=document,
            start=smallest(number * decoder),
            length=np.full(len(document), context + decoder, np.int32),
        ),
        context=context,
        decoder=decoder,
    )


def in_stream(lengths: Ints, context: int, decoder: int, seed: int) -> Windows:
    """The same windows over all documents, shuffled and joined: `floor((total - P) / D)`.

    Args:
        lengths: `[documents]` tokens in each, each at least 1.
        context: P, tokens; 0: only the tiling, for `warm_up`.
        decoder: D, tokens.
        seed: of the shuffle.
    """
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(lengths))
    size = lengths[order].astype(np.int64)
    ends = np.cumsum(size)
    total = int(ends[-1]) if len(ends) else 0
    begin = np.arange(max((total - context) // decoder, 0)) * decoder
    end = begin + context + decoder
    first = np.searchsorted(ends, begin, side="right")  # place in `order` of the first document
    pieces = np.searchsorted(ends, end) - first + 1
    offsets = np.concatenate([[0], np.cumsum(pieces)])
    window = np.repeat(np.arange(len(begin)), pieces)
    place = np.arange(len(window)) - offsets[window] + first[window]
    starts = np.maximum(begin[window], (ends - size)[place])
    stops = np.minimum(end[window], ends[place])
    return Windows(
        rows=Rows(
            offsets=offsets,
            document=smallest(order[place]),
            start=smallest(starts - (ends - size)[place]),
            length=smallest(stops - starts),
        ),
        context=context,
        decoder=decoder,
    )


def warm_up(tiling: Windows) -> Windows:
    """Windows whose context is their own D decoder tokens, so that the encoder learns to be copied.

    Args:
        tiling: windows with no context (P = 0).
    """
    assert tiling.context == 0
    return replace(tiling, context=tiling.decoder)


@dataclass(frozen=True)
class WindowRows:
    """Windows as rows of a batch: decoder tokens `[D]` and contexts `[c l]`, c = P / l.

    Args:
        corpus: the documents that the windows were planned on.
        windows: the plan.
        chunk: l, tokens per context.
        about: stands before what `describe` says.

    Raises:
        UserError: if P is not a multiple of l.
    """

    corpus: Corpus
    windows: Windows
    chunk: int
    about: str = ""

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.windows.context % self.chunk:
            raise UserError(
                f"{self.windows.context} context tokens cannot be cut into chunks of {self.chunk}"
            )

    def __len__(self) -> int:
        """Windows in one epoch."""
        return len(self.windows)

    def row(self, number: int) -> Row:
        """The fields of one window. Its text is one stream: documents are not masked.

        No `context_mask`, as every token is real, and without context no `contexts`.
        """
        pieces = self.windows.rows.pieces(number)
        size = sum(length for _, _, length in pieces)
        whole = self.corpus.row(pieces, size, mask_documents=False)
        contexts = whole["tokens"][: self.windows.context].reshape(-1, self.chunk)
        decoder = slice(size - self.windows.decoder, size)
        row = {
            "tokens": whole["tokens"][decoder],
            "labels": whole["labels"][decoder],
            "positions": np.arange(self.windows.decoder, dtype=np.int64),
        }
        return row | ({"contexts": contexts} if len(contexts) else {})

    def describe(self) -> str:
        """What it holds, in one line."""
        plan = self.windows
        chunks = f"{plan.context // self.chunk} x {self.chunk} context + " if plan.context else ""
        what = "decoder tokens" if plan.context else "tokens"
        return f"{self.about}{len(plan):,} windows of {chunks}{plan.decoder:,} {what}"
