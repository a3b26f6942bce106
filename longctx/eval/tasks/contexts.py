"""Perplexity of the end of a decoder's window, behind n contexts of l tokens right before it.

Only the last T of the decoder's D tokens are scored. Two named protocols:

- `cepe_tail_matched`, the one to compare counts with: the same decoder windows and the same scored
  tokens under every n, only the number of contexts differs. `gain` is the fall of the loss against
  n = 0 on the same tokens, with the error of that difference.
- `cepe_tail` (CEPE 2402.16617 section 4.1 and its code): windows of n l + D tokens slide by T from
  a document's start, so each n scores other text.

Every sample has T scored tokens, so the mean of sample means, which CEPE prints, is the mean over
tokens. A model with an encoder reads the contexts there; another reads the same tokens in front,
that is by attention over all of them. Costs one forward pass a sample, count and kind of context.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from longctx.config.typed import choice, positive
from longctx.data.store import Store
from longctx.errors import UserError
from longctx.eval.evaluation import Evaluation, distinct
from longctx.eval.figures import legend, perplexity_by, save
from longctx.eval.headline import Column, gain, nats, shared
from longctx.eval.journal import Journal
from longctx.eval.results import Results, protocols_of
from longctx.eval.score import has_encoder
from longctx.eval.scored_windows import (
    Documents,
    FloatArray,
    Window,
    choose_documents,
    evenly,
    matched_ends,
    mean_over,
    score_windows,
)
from longctx.eval.subject import Subject, digest_of, open_store
from longctx.eval.tables import gain_cell, image, table
from longctx.eval.task import Found, Sample, Task, TaskResult

End = tuple[int, int]  # document, one past the last token of a decoder window
NOTES = {
    "cepe_tail_matched": "The same decoder windows and scored tokens in every column, only the "
    "number of contexts before them differs",
    "cepe_tail": "Windows of contexts and decoder tokens slide by the scored ones, so each column "
    "scores other text",
}
PLACES = {"none": "none", "own": "right before it", "other": "of another document"}
LINES = {"own": ("context right before it", "-"), "other": ("context of another document", ":")}


@dataclass(frozen=True)
class Contexts(Task):
    """Perplexity behind n contexts, CEPE's protocols.

    Args:
        protocols: `cepe_tail_matched | cepe_tail`, one or both.
        counts: numbers of contexts, n; 0: the decoder alone.
        size: tokens in a context, l.
        decoder_tokens: tokens that the decoder reads for itself, D.
        target_tokens: tokens scored, the last of those, T.
        other: also measure with the context of another document.
        windows: samples per document, at most.
        max_documents: documents scored, evenly spaced over the store. None: all long enough.
    """

    place: ClassVar[int] = 80

    protocols: list[str] = field(default_factory=lambda: ["cepe_tail_matched"])
    counts: list[int] = field(default_factory=lambda: [0, 4, 16, 64])
    size: int = 64
    decoder_tokens: int = 256
    target_tokens: int = 64
    other: bool = True
    windows: int = 8
    max_documents: int | None = 8

    def __post_init__(self) -> None:
        for protocol in self.protocols:
            choice(protocol, tuple(NOTES), "contexts.protocols")
        distinct(self.counts, "contexts.counts", 0)
        for key in ("size", "target_tokens", "windows", "max_documents"):
            if (value := getattr(self, key)) is not None:
                positive(value, f"contexts.{key}")
        if self.target_tokens >= self.decoder_tokens:
            raise UserError(
                f"contexts.target_tokens={self.target_tokens} must be below "
                f"contexts.decoder_tokens={self.decoder_tokens}"
            )

    @property
    def longest(self) -> int:
        """Context and decoder tokens of the largest count."""
        return max(self.counts) * self.size + self.decoder_tokens

    @property
    def of_a_store(self) -> bool:
        """Every protocol scores it."""
        return True

    def _chosen(self, cfg: Evaluation) -> tuple[Store, list[int], int]:
        """The store, the documents to score, and how many were too short."""
        store = open_store(cfg)
        asked = f"contexts.counts of {self.size} tokens behind {self.decoder_tokens} ask"
        found = choose_documents(store, self.longest, self.max_documents, str(store.path), asked)
        if self.other and max(self.counts) and len(found[0]) < 2:
            raise UserError(
                f"{store.path} has one document of {self.longest} tokens or more: contexts of "
                "another document need two; use smaller contexts.counts, or contexts.other=false"
            )
        return store, *found

    def inputs(self, cfg: Evaluation) -> dict[str, Any]:
        """The store's content; nothing is drawn at random."""
        return {"held_out": digest_of(self._chosen(cfg)[0])}

    def run(self, cfg: Evaluation, subject: Subject) -> TaskResult:
        """Results by protocol, a row a count and kind of context, and one record a sample."""
        store, chosen, skipped = self._chosen(cfg)
        plan = Plan(store, chosen, self, cfg.batch_tokens, subject.journal)
        common = {
            "bos": "document_start",
            "documents": len(chosen),
            "skipped": skipped,
            "size": self.size,
            "decoder_tokens": self.decoder_tokens,
            "target_tokens": self.target_tokens,
            "contexts_read_by": "encoder" if has_encoder(subject.model) else "decoder",
        }
        protocols, records = {}, []
        for protocol in self.protocols:
            result, found = measure(subject.model, plan, protocol)
            protocols[protocol] = common | result
            records += found
        return {"protocols": protocols}, records

    @classmethod
    def section(cls, found: Found, out: Path) -> Iterator[str]:
        """One table and one figure a protocol."""
        models = [model for model, _ in found]
        for name in dict.fromkeys(n for m in models for n in protocols_of(m, cls.name)):
            having = [m for m in models if name in protocols_of(m, cls.name)]
            own = protocols_of(having[0], cls.name)[name]
            yield from (f"## Perplexity behind contexts, `{name}`", "")
            yield f"{NOTES[name]}. Columns: contexts of {own['size']} tokens."
            yield (
                f"The last {own['target_tokens']} of {own['decoder_tokens']} decoder tokens are "
                f"scored; {own['documents']} documents, {own['skipped']} shorter ones skipped, "
                f"{own['rows'][-1]['tokens']:,} tokens scored in the last column; BOS at the "
                f"{own['bos'].replace('_', ' ')}. Every sample has as many scored tokens, so the "
                "mean over samples is the mean over tokens; ± is one standard error; gain: fall of "
                "the loss against no context, nats a token."
            )
            yield ""
            yield from _table([(m["label"], protocols_of(m, cls.name)[name]) for m in having])
            figure = contexts_figure(having, name, out / f"contexts_{name}.png")
            yield from image(f"Perplexity behind contexts, {name}", figure)

    @classmethod
    def columns(cls, models: Sequence[Results]) -> Iterator[Column]:
        """The gain of the most contexts."""
        rows = []
        for m in models:
            own = protocols_of(m, cls.name).get("cepe_tail_matched", {"rows": []})["rows"]
            rows.append({r["context_tokens"]: gain(r) for r in own if r["context"] == "own"})
        for most in shared(rows)[-1:]:
            values = [r.get(most) for r in rows]
            yield Column(f"gain of {most:,} tokens of context, nats", values, nats)


def _table(found: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    counts = sorted({r["count"] for _, result in found for r in result["rows"]})
    rows = []
    for label, result in found:
        for kind in ("own", "other"):
            line = [r for r in result["rows"] if r["context"] in ("none", kind)]
            if kind == "own" or any(r["context"] == kind for r in line):
                cells = {r["count"]: gain_cell(r) for r in line}
                numbers = [cells.get(n, "") for n in counts]
                rows.append([label, result["contexts_read_by"], PLACES[kind], *numbers])
    return table(["model", "read by", "context", *map(str, counts)], rows)


@dataclass(frozen=True)
class Plan:
    """What is scored.

    Args:
        documents: the store.
        chosen: indices of its documents that are scored.
        own: sizes and counts.
        batch_tokens: tokens in one forward pass, unless a single sample is longer.
        journal: keeps what is scored, a batch at a time.
    """

    documents: Documents
    chosen: Sequence[int]
    own: "Contexts"
    batch_tokens: int
    journal: Journal = field(default_factory=Journal)

    def nll(self, model: nn.Module, windows: Sequence[Window], title: str) -> list[FloatArray]:
        """Scores windows; see `longctx.eval.scored_windows.score_windows`."""
        return score_windows(
            model, self.documents, windows, self.batch_tokens, title, journal=self.journal
        )


def tail_ends(plan: Plan, count: int) -> list[End]:
    """Ends of windows of n l + D tokens that slide by T, evenly thinned to `windows` a document."""
    own = plan.own
    total = count * own.size + own.decoder_tokens
    ends = []
    for i in plan.chosen:
        places = (int(plan.documents.lengths[i]) - total) // own.target_tokens + 1
        ends += [(i, total + p * own.target_tokens) for p in evenly(places, own.windows)]
    return ends


def strangers(ends: Sequence[End]) -> list[End]:
    """For each window one of the next document, whose context it borrows."""
    of: dict[int, list[End]] = {}
    for end in ends:
        of.setdefault(end[0], []).append(end)
    documents = list(of)
    assert len(documents) > 1, "another document's context needs another document"
    result = []
    for place, document in enumerate(documents):
        theirs = of[documents[(place + 1) % len(documents)]]
        result += [theirs[i % len(theirs)] for i in range(len(of[document]))]
    return result


def windows_behind(own: Contexts, ends: Sequence[End], count: int, kind: str) -> list[Window]:
    """Decoder windows with their contexts, in the order of the text.

    Args:
        own: sizes.
        ends: of the decoder windows.
        count: contexts of each.
        kind: `own | other`: whose contexts; with none the two are the same.
    """
    sources = strangers(ends) if kind == "other" else ends
    plan = []
    for (document, end), (source, stop) in zip(ends, sources, strict=True):
        begin = stop - own.decoder_tokens - count * own.size
        starts = [begin + i * own.size for i in range(count)]
        beside = tuple((source, start, start + own.size) for start in starts)
        window = Window(document, end - own.decoder_tokens, end, end - own.target_tokens)
        plan.append(replace(window, contexts=beside))
    return plan


def measure(model: nn.Module, plan: Plan, protocol: str) -> tuple[dict[str, Any], list[Sample]]:
    """One row for each count and kind of context.

    Args:
        model: see `longctx.eval.score.token_nll`.
        plan: documents and sizes.
        protocol: `cepe_tail_matched | cepe_tail`.

    Returns:
        The result, and one record a sample.
    """
    own, matched = plan.own, protocol == "cepe_tail_matched"
    longest, target = own.longest, own.target_tokens
    same = matched_ends(plan.documents, plan.chosen, longest, target, own.windows)
    rows: list[dict[str, Any]] = []
    records: list[Sample] = []
    alone: list[FloatArray] | None = None
    for count in sorted(own.counts):
        ends = same if matched else tail_ends(plan, count)
        for kind in ("none",) if not count else ("own", "other") if own.other else ("own",):
            windows = windows_behind(own, ends, count, kind)
            title = f"{protocol} {count} {kind}"
            nlls = plan.nll(model, windows, title)
            alone = nlls if count == 0 else alone
            row = {"count": count, "context": kind, "context_tokens": count * own.size}
            row |= {"samples": len(windows), **mean_over(windows, nlls).row()}
            if matched and alone is not None:
                falls = [a - b for a, b in zip(alone, nlls, strict=True)]
                gain = mean_over(windows, falls)
                row |= {"gain": gain.nll, "gain_se": gain.se}
            rows.append(row)
            records += _records(protocol, row, windows, nlls)
    return {"rows": rows}, records


def _records(
    protocol: str, row: dict[str, Any], windows: Sequence[Window], nlls: Sequence[FloatArray]
) -> list[Sample]:
    return [
        {
            "task": "contexts",
            "protocol": protocol,
            "count": row["count"],
            "context": row["context"],
            "document": w.document,
            "span": [w.start, w.stop],
            "first_scored": w.first,
            "contexts_from": [*w.contexts[0][:2], w.contexts[-1][2]] if w.contexts else None,
            "nll": float(nll.mean()),
        }
        for w, nll in zip(windows, nlls, strict=True)
    ]


def contexts_figure(models: Sequence[Results], protocol: str, path: Path) -> str:
    """Perplexity against tokens of context, own and of another document.

    Args:
        models: contents of `results.json` that hold the protocol.
        protocol: its name.
        path: PNG to write.

    Returns:
        The file's name.
    """
    parts = [protocols_of(m, "contexts")[protocol]["rows"] for m in models]
    figure, axes = perplexity_by(models, parts, "context", LINES)
    axes.set_xlabel("context before the decoder's window, tokens")
    axes.set_title(f"Perplexity behind contexts, protocol {protocol}", fontsize=11)
    legend(figure)
    return save(figure, path)
