"""Three named perplexity protocols; the name stands beside every number they give.

(`whole_window.py` has a fourth, `contexts.py` CEPE's.)

- `sliding_new_tokens` (Position Interpolation, Press et al.): a window moves by the stride and
  only its new tokens are scored. One forward of W tokens per stride: the dearest, and the one
  papers print.
- `single_pass_buckets`: one forward per document; NLL by position. The cheapest, a whole curve
  at once; but early and late positions hold different text.
- `token_matched`: the same target tokens under every length, so only the context differs. One
  forward per length and window; the one to compare lengths with.

All take the same documents, those as long as the longest length asked for. BOS stands at the
start of a document, so windows that begin inside one carry none (`bos: document_start`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from longctx.errors import UserError
from longctx.eval.journal import Journal
from longctx.eval.windows import Documents, FloatArray, Window, evenly, mean_over, score_windows

FIRST_BUCKET = 16  # shorter contexts share one bucket


@dataclass(frozen=True)
class Text:
    """What is scored.

    Args:
        documents: the store.
        chosen: indices of its documents that are scored.
        batch_tokens: tokens in one forward pass, unless a single window is longer.
        journal: keeps what is scored, a batch at a time.
    """

    documents: Documents
    chosen: Sequence[int]
    batch_tokens: int
    journal: Journal = field(default_factory=Journal)

    def nll(self, model: nn.Module, plan: Sequence[Window], title: str) -> list[FloatArray]:
        """Scores a plan; see `longctx.eval.windows.score_windows`."""
        return score_windows(
            model, self.documents, plan, self.batch_tokens, title, journal=self.journal
        )


def choose_documents(
    documents: Documents,
    length: int,
    max_documents: int | None,
    where: str,
    asked: str = "lengths ask",
) -> tuple[list[int], int]:
    """Documents of at least `length` tokens, evenly spaced over the store.

    Args:
        documents: the store.
        length: the longest length asked for, tokens.
        max_documents: at most so many; None: all.
        where: the store's name, for the error.
        asked: what asks for that length, for the error.

    Returns:
        Their indices, and how many shorter documents were skipped.

    Raises:
        UserError: if no document is long enough.
    """
    fit = np.flatnonzero(documents.lengths >= length)
    if not len(fit):
        longest = int(documents.lengths.max(initial=0))
        raise UserError(
            f"{asked} for {length} tokens, but the longest document of {where} has {longest}"
        )
    chosen = [int(fit[i]) for i in evenly(len(fit), max_documents)]
    return chosen, len(documents.lengths) - len(fit)


def sliding_windows(document: int, tokens: int, window: int, stride: int) -> Iterator[Window]:
    """Every token after the first is scored exactly once, with at least W - S tokens before it.

    Source: Position Interpolation (2306.15595) section 3.2, after Press et al. (2012.15832).
    The last window ends with the document and is as wide as the others.

    Args:
        document: its index.
        tokens: how many of its tokens take part.
        window: W, tokens.
        stride: S < W, tokens.
    """
    done = min(window, tokens)
    yield Window(document, 0, done, 1)
    while done < tokens:
        stop = min(done + stride, tokens)
        yield Window(document, stop - window, stop, done)
        done = stop


def sliding_new_tokens(
    model: nn.Module,
    text: Text,
    lengths: Sequence[int],
    stride: int,
    document_tokens: int | None,
) -> dict[str, Any]:
    """Perplexity with a sliding window, one row per window width.

    Args:
        model: see `longctx.eval.score.token_nll`.
        text: the documents.
        lengths: window widths W, tokens.
        stride: S, tokens.
        document_tokens: documents are cut to so many, but never below the widest window; None:
            whole documents.
    """
    assert stride < min(lengths), "a window must see something before what it scores"
    limit = None if document_tokens is None else max(document_tokens, *lengths)
    whole = [int(text.documents.lengths[i]) for i in text.chosen]
    cut = whole if limit is None else [min(tokens, limit) for tokens in whole]
    rows = []
    for length in lengths:
        plan = [
            window
            for i, tokens in zip(text.chosen, cut, strict=True)
            for window in sliding_windows(i, tokens, length, stride)
        ]
        nlls = text.nll(model, plan, f"sliding {length}")
        rows.append({"length": length, **mean_over(plan, nlls).row()})
    return {"stride": stride, "document_tokens": limit, "rows": rows}


def bucket_ends(length: int) -> list[int]:
    """Powers of two from `FIRST_BUCKET` up, closed by `length`.

    A token with p tokens before it belongs to the first bucket whose end is above p.
    """
    ends = []
    end = FIRST_BUCKET
    while end < length:
        ends.append(end)
        end *= 2
    return [*ends, length]


def bucket_gain(ends: Sequence[int], nll: Sequence[float], se: Sequence[float | None]) -> int:
    """The largest position p with NLL(p) < NLL(p/2) - 2 s.e.: context beyond p/2 still helps.

    Args:
        ends: bucket ends, rising.
        nll: mean NLL of each bucket.
        se: standard error of each; the two of a pair are added in quadrature. None is 0.

    Returns:
        The end of that bucket; 0 if no bucket is better than the one before it.
    """
    gain = 0
    for i in range(1, len(ends)):
        error = float(np.hypot(se[i] or 0.0, se[i - 1] or 0.0))
        if nll[i] < nll[i - 1] - 2 * error:
            gain = ends[i]
    return gain


def single_pass_buckets(
    model: nn.Module,
    text: Text,
    lengths: Sequence[int],
) -> dict[str, Any]:
    """One forward over the first L tokens of each document, one row per L, NLL by position.

    Args:
        model: see `longctx.eval.score.token_nll`.
        text: the documents.
        lengths: L, tokens. A causal model of fixed positions gives the same curve in each, up to
            L; methods that look at the whole length (dynamic NTK) do not.
    """
    rows = []
    for length in lengths:
        plan = [Window(i, 0, length, 1) for i in text.chosen]
        nlls = text.nll(model, plan, f"single pass {length}")
        ends = bucket_ends(length)
        starts = [1, *ends[:-1]]
        means = [
            mean_over(plan, [nll[start - 1 : end - 1] for nll in nlls])
            for start, end in zip(starts, ends, strict=True)
        ]
        buckets = [
            {"start": start, "end": end, **mean.row()}
            for start, end, mean in zip(starts, ends, means, strict=True)
        ]
        gain = bucket_gain(ends, [m.nll for m in means], [m.se for m in means])
        whole = mean_over(plan, nlls).row()
        rows.append({"length": length, **whole, "bucket_gain": gain, "buckets": buckets})
    return {"rows": rows}


def matched_ends(
    documents: Documents, chosen: Sequence[int], longest: int, target_tokens: int, windows: int
) -> list[tuple[int, int]]:
    """Where windows of up to `longest` tokens end: (document, one past their last token).

    Args:
        documents: the store.
        chosen: indices of its documents, each of at least `longest` tokens.
        longest: tokens before an end that must be in the document.
        target_tokens: the last tokens before an end; they never overlap.
        windows: at most so many in each document, evenly spaced.
    """
    ends: list[tuple[int, int]] = []
    for i in chosen:
        room = int(documents.lengths[i]) - longest
        places = evenly(room + 1, min(windows, room // target_tokens + 1))
        ends += [(i, longest + place) for place in places]
    return ends


def token_matched(
    model: nn.Module,
    text: Text,
    lengths: Sequence[int],
    target_tokens: int,
    windows: int,
) -> dict[str, Any]:
    """NLL of the same target tokens, the last T of each window, under every window width.

    Args:
        model: see `longctx.eval.score.token_nll`.
        text: the documents.
        lengths: window widths L, tokens: a target sees L - T to L - 1 tokens before it.
        target_tokens: T, tokens.
        windows: at most so many places in each document, evenly spaced, never overlapping.
    """
    assert target_tokens < min(lengths), "a window must see something before what it scores"
    ends = matched_ends(text.documents, text.chosen, max(lengths), target_tokens, windows)
    rows = []
    for length in lengths:
        plan = [Window(i, end - length, end, end - target_tokens) for i, end in ends]
        nlls = text.nll(model, plan, f"token matched {length}")
        rows.append({"length": length, **mean_over(plan, nlls).row()})
    return {"target_tokens": target_tokens, "windows": len(ends), "rows": rows}
