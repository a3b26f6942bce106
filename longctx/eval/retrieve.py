"""Passages of a token store, and BM25 over their words: which are the best for a query.

Passages are pieces of equal size; a text is never given passages of itself. BM25 has no stop words
and no stemming, so every language is treated in the same way. Indexing takes about 0.1 ms a passage
of a hundred words, a query some milliseconds over 60,000 passages.
Source: Robertson & Zaragoza 2009, in the form of Lucene (k1 = 1.5, b = 0.75), by bm25s.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from bm25s import BM25
from numpy.typing import NDArray

from longctx.errors import UserError
from longctx.eval.scored_windows import Documents, FloatArray

K1, B = 1.5, 0.75
WORD = re.compile(r"\w+")

Span = tuple[int, int, int]  # document, first token, one past the last


def words(text: str) -> list[str]:
    """What BM25 counts.

    >>> words("It's 5 o'clock")
    ['it', 's', '5', 'o', 'clock']
    """
    return WORD.findall(text.lower())


class Ranker:
    """An index over texts.

    Args:
        texts: what is ranked.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        split = [words(text) for text in texts]
        self.size = len(split)
        self._index = BM25(k1=K1, b=B, method="lucene") if any(split) else None
        if self._index is not None:
            self._index.index(split, show_progress=False)

    def scores(self, query: str) -> FloatArray:
        """`[texts]`, 0 where no word is shared."""
        if self._index is None:
            return np.zeros(self.size)
        known = [word for word in words(query) if word in self._index.vocab_dict]
        if not known:
            return np.zeros(self.size)
        return np.asarray(self._index.get_scores(known), dtype=np.float64)

    def ranked(self, query: str) -> tuple[NDArray[np.int64], FloatArray]:
        """Indices of all texts, the best first and ties in their own order; and all scores."""
        scores = self.scores(query)
        return np.argsort(-scores, kind="stable"), scores


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
