"""Passages of a token store, and which of them are best for a query.

Passages are pieces of equal size; a text is never given passages of itself. Costs an index over the
text of all passages (see `bm25.py`), a few milliseconds a query, and 24 bytes a passage.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from longctx.errors import UserError
from longctx.eval.bm25 import Ranker
from longctx.eval.windows import Documents, FloatArray

Span = tuple[int, int, int]  # document, first token, one past the last


def cut(documents: Documents, size: int) -> list[Span]:
    """Passages of `size` tokens, without BOS, EOS and what is left over at a document's end."""
    return [
        (i, start, start + size)
        for i, length in enumerate(documents.lengths.tolist())
        for start in range(1, length - size, size)
    ]


def same_documents(ours: Documents, theirs: Documents) -> dict[int, set[int]]:
    """For each of our documents, the indices of theirs with the same tokens."""
    found: dict[bytes, set[int]] = {}
    for j in range(len(theirs.lengths)):
        found.setdefault(theirs.tokens(j).astype(np.int64).tobytes(), set()).add(j)
    everyone = range(len(ours.lengths))
    return {i: found.get(ours.tokens(i).astype(np.int64).tobytes(), set()) for i in everyone}


@dataclass(frozen=True)
class Retriever:
    """Passages of a store and their ranking.

    Args:
        store: where passages are cut from.
        spans: of all passages.
        ranker: over their texts, in the order of `spans`.
        decode: tokens to text.
    """

    store: Documents
    spans: Sequence[Span]
    ranker: Ranker
    decode: Callable[[list[int]], str]

    def best(self, query: list[int], k: int, excluded: set[int]) -> tuple[list[Span], FloatArray]:
        """The k best passages of documents that are not excluded, and their scores.

        Args:
            query: tokens.
            k: how many.
            excluded: documents whose passages are left out.

        Raises:
            UserError: if there are fewer than k.
        """
        order, scores = self.ranker.ranked(self.decode(query))
        allowed = [int(i) for i in order if self.spans[i][0] not in excluded][:k]
        if len(allowed) < k:
            raise UserError(
                f"retrieval_perplexity asks for {k} passages, but other documents have "
                f"{len(allowed)}: use a larger retrieval_perplexity.store, or fewer passages"
            )
        return [self.spans[i] for i in allowed], scores[allowed]
