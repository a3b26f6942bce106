"""Perplexity with k retrieved passages, and RePlug as the baseline.

The decoder reads D tokens; the first of them are the query and the rest is scored, the same tokens
under every k. Passages are pieces of equal size of other documents, ranked by BM25 and read best
first: by the encoder if the model has one, else in front of the decoder's tokens. Costs one forward
pass a sample and k.

RePlug (2301.12652) reads each passage in front of a copy of the input and mixes the probabilities
with the softmax of the retriever's scores: k forward passes of one passage each. The mixture is
formed in log space. It needs no training, so it is that of the decoder alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn

from longctx.config.typed import positive
from longctx.data.store import Store
from longctx.errors import UserError
from longctx.eval.evaluation import Evaluation, distinct
from longctx.eval.figures import legend, perplexity_by, save
from longctx.eval.headline import Column, cells_of, gain, nats, shared
from longctx.eval.journal import Journal
from longctx.eval.results import Results, result_of
from longctx.eval.retrieve import Ranker, Retriever, Span, cut, same_documents
from longctx.eval.score import has_encoder
from longctx.eval.scored_windows import (
    Documents,
    FloatArray,
    Window,
    choose_documents,
    matched_ends,
    mean_over,
    score_windows,
)
from longctx.eval.subject import Subject, digest_of, open_store
from longctx.eval.tables import gain_cell, image, table
from longctx.eval.task import Found, Sample, Task, TaskResult

METHODS = {"contexts": "all in one pass", "replug": "RePlug"}
LINES = {"contexts": ("all passages in one pass", "-"), "replug": ("RePlug", ":")}


@dataclass(frozen=True)
class RetrievalPerplexity(Task):
    """Perplexity with retrieved passages, and RePlug.

    Args:
        store: token store that passages are cut from. None: that of `held_out`.
        passages: numbers of passages read, k; 0: none.
        replug: numbers of passages for RePlug, one forward pass each. Empty: not measured.
        size: tokens in a passage.
        decoder_tokens: tokens that the decoder reads for itself, D.
        query_tokens: the first of those, which are the query and are not scored.
        temperature: of RePlug's softmax over scores.
        windows: samples per document, at most.
        max_documents: documents scored, evenly spaced over the store. None: all long enough.
    """

    place: ClassVar[int] = 90

    store: str | None = None
    passages: list[int] = field(default_factory=lambda: [0, 2, 8])
    replug: list[int] = field(default_factory=lambda: [2, 8])
    size: int = 64
    decoder_tokens: int = 192
    query_tokens: int = 64
    temperature: float = 1.0
    windows: int = 8
    max_documents: int | None = 8

    def __post_init__(self) -> None:
        where = "retrieval_perplexity"
        distinct(self.passages, f"{where}.passages", 0)
        if self.replug:
            distinct(self.replug, f"{where}.replug", 1)
        for key in ("size", "query_tokens", "temperature", "windows", "max_documents"):
            if (value := getattr(self, key)) is not None:
                positive(value, f"{where}.{key}")
        if self.query_tokens >= self.decoder_tokens:
            raise UserError(
                f"{where}.query_tokens={self.query_tokens} must be below "
                f"{where}.decoder_tokens={self.decoder_tokens}"
            )

    @property
    def longest(self) -> int:
        """Passage and decoder tokens of the largest number of passages."""
        return max(self.passages) * self.size + self.decoder_tokens

    @property
    def of_a_store(self) -> bool:
        """Its documents are scored."""
        return True

    def _stores(self, cfg: Evaluation) -> tuple[Store, list[int], int, Store]:
        """The store, documents to score, how many were too short, and the store of passages."""
        store = open_store(cfg)
        passages = store if self.store is None else open_store(cfg, self.store)
        asked = "retrieval_perplexity.decoder_tokens asks"
        chosen, skipped = choose_documents(
            store, self.decoder_tokens, self.max_documents, str(store.path), asked
        )
        return store, chosen, skipped, passages

    def inputs(self, cfg: Evaluation) -> dict[str, Any]:
        """The content of both stores; nothing is drawn at random."""
        store, _, _, passages = self._stores(cfg)
        return {"held_out": digest_of(store), "store": digest_of(passages)}

    def run(self, cfg: Evaluation, subject: Subject) -> TaskResult:
        """A row for each k, one for each k of RePlug, and one record a sample."""
        store, chosen, skipped, passages = self._stores(cfg)
        spans = cut(passages, self.size)
        texts = [subject.decode(passages.tokens(*span).tolist()) for span in spans]
        retriever = Retriever(passages, spans, Ranker(texts), subject.decode)
        scored = self.decoder_tokens - self.query_tokens
        windows = [
            Window(i, end - self.decoder_tokens, end, end - scored)
            for i, end in matched_ends(store, chosen, self.decoder_tokens, scored, self.windows)
        ]
        same = same_documents(store, passages)
        k = max([*self.passages, *self.replug])
        found = []
        for w in windows:
            query = store.tokens(w.document, w.start, w.first).tolist()
            found.append(retriever.best(query, k, same[w.document]))
        reader = Reader(subject.model, store, passages, cfg.batch_tokens, subject.journal)
        result, records = measure(reader, self, windows, found)
        common = {
            "bos": "document_start",
            "documents": len(chosen),
            "skipped": skipped,
            "pool": len(spans),
            "size": self.size,
            "decoder_tokens": self.decoder_tokens,
            "target_tokens": scored,
            "temperature": self.temperature,
            "contexts_read_by": "encoder" if has_encoder(subject.model) else "decoder",
        }
        return common | result, records

    @classmethod
    def section(cls, found: Found, out: Path) -> Iterator[str]:
        """A row a model and way to read the passages."""
        own = found[0][1]
        yield from ("## Perplexity with retrieved passages", "")
        yield (
            f"Passages of {own['size']} tokens of other documents, best of {own['pool']:,} by "
            f"BM25; the query is the first {own['decoder_tokens'] - own['target_tokens']} of "
            f"{own['decoder_tokens']} decoder tokens, the rest is scored, the same in every "
            f"column. RePlug mixes by the softmax of scores / {own['temperature']:g}; mixed: "
            "exp(entropy) of its weights. "
            "± is one standard error; gain: fall of the loss against no passage, nats a token."
        )
        yield ""
        counts = sorted({r["k"] for _, result in found for r in result["rows"]})
        rows = []
        for model, result in found:
            for method, name in METHODS.items():
                if any(r["method"] == method for r in result["rows"]):
                    line = [r for r in result["rows"] if r["method"] in ("none", method)]
                    cells = {r["k"]: gain_cell(r) for r in line}
                    reader = result["contexts_read_by"] if method == "contexts" else "decoder"
                    rows.append([model["label"], name, reader, *(cells.get(k, "") for k in counts)])
        yield from table(["model", "passages", "read by", *map(str, counts)], rows)
        figure = retrieval_figure([m for m, _ in found], out / "retrieval_perplexity.png")
        yield from image("Perplexity with retrieved passages", figure)

    @classmethod
    def columns(cls, models: Sequence[Results]) -> Iterator[Column]:
        """The gain of the most passages."""
        rows = []
        for m in models:
            own = [r for r in cells_of(m, cls.name, "rows") if r["method"] == "contexts"]
            rows.append({r["k"]: gain(r) for r in own})
        for k in shared(rows)[-1:]:
            yield Column(f"gain of {k} retrieved passages, nats", [r.get(k) for r in rows], nats)


def log_weights(scores: FloatArray, temperature: float) -> FloatArray:
    """Log of the softmax of scores / temperature.

    Args:
        scores: `[k]`.
        temperature: above 0.
    """
    scaled = scores / temperature
    return np.asarray(scaled - np.logaddexp.reduce(scaled), dtype=np.float64)


def mixture(nlls: FloatArray, scores: FloatArray, temperature: float) -> FloatArray:
    """NLL of the mixture of k distributions, each token by itself.

    Source: RePlug (2301.12652) section 3.2.

    Args:
        nlls: `[k n]` nats, of the same tokens behind each passage.
        scores: `[k]` of the retriever.
        temperature: of their softmax.

    Returns:
        `[n]` nats.
    """
    weighted = log_weights(scores, temperature)[:, None] - nlls
    return np.asarray(-np.logaddexp.reduce(weighted, axis=0), dtype=np.float64)


@dataclass(frozen=True)
class Reader:
    """Who reads what.

    Args:
        model: see `longctx.eval.score.token_nll`.
        documents: the store that is scored.
        passages: the store that passages come from.
        batch_tokens: tokens in one forward pass, unless a single sample is longer.
        journal: keeps what is scored, a batch at a time.
    """

    model: nn.Module
    documents: Documents
    passages: Documents
    batch_tokens: int
    journal: Journal = field(default_factory=Journal)

    def nll(self, windows: Sequence[Window], title: str, in_front: bool) -> list[FloatArray]:
        """See `longctx.eval.scored_windows.score_windows`."""
        return score_windows(
            self.model,
            self.documents,
            windows,
            self.batch_tokens,
            title,
            contexts=self.passages,
            in_front=in_front,
            journal=self.journal,
        )


def measure(
    reader: Reader,
    own: RetrievalPerplexity,
    windows: Sequence[Window],
    found: Sequence[tuple[list[Span], FloatArray]],
) -> tuple[dict[str, Any], list[Sample]]:
    """One row for each k, and one for each k of RePlug.

    Args:
        reader: model and stores.
        own: numbers of passages and the temperature.
        windows: what is scored.
        found: passages and scores of each window, best first, for the largest k.

    Returns:
        The result, and one record a sample.
    """
    alone: list[FloatArray] | None = None
    rows: list[dict[str, Any]] = []
    records: list[Sample] = []

    def add(method: str, k: int, nlls: list[FloatArray], **more: Any) -> None:
        row = {"method": method, "k": k, "context_tokens": k * own.size, **more}
        row |= {"samples": len(windows), **mean_over(windows, nlls).row()}
        if alone is not None:
            gain = mean_over(windows, [a - b for a, b in zip(alone, nlls, strict=True)])
            row |= {"gain": gain.nll, "gain_se": gain.se}
        rows.append(row)
        records.extend(_records(method, k, windows, found, nlls))

    for k in sorted(own.passages):
        behind = [
            replace(w, contexts=tuple(spans[:k]))
            for w, (spans, _) in zip(windows, found, strict=True)
        ]
        nlls = reader.nll(behind, f"retrieval {k}", in_front=False)
        alone = nlls if k == 0 else alone
        add("contexts" if k else "none", k, nlls)
    if own.replug:
        each = _each(reader, windows, found, max(own.replug))
        for k in sorted(own.replug):
            mixed = [
                mixture(nll[:k], scores[:k], own.temperature)
                for nll, (_, scores) in zip(each, found, strict=True)
            ]
            used = [_effective(scores[:k], own.temperature) for _, scores in found]
            add("replug", k, mixed, effective_passages=float(np.mean(used)))
    return {"rows": rows}, records


def _each(
    reader: Reader,
    windows: Sequence[Window],
    found: Sequence[tuple[list[Span], FloatArray]],
    k: int,
) -> list[FloatArray]:
    """`[k n]` of each window: its NLL behind each passage alone."""
    single = [
        replace(w, contexts=(span,))
        for w, (spans, _) in zip(windows, found, strict=True)
        for span in spans[:k]
    ]
    nlls = reader.nll(single, f"replug {k}", in_front=True)
    return [np.stack(nlls[i : i + k]) for i in range(0, len(nlls), k)]


def _effective(scores: FloatArray, temperature: float) -> float:
    """exp(entropy) of the weights: how many passages RePlug really mixes."""
    weights = log_weights(scores, temperature)
    return float(np.exp(-(np.exp(weights) * weights).sum()))


def _records(
    method: str,
    k: int,
    windows: Sequence[Window],
    found: Sequence[tuple[list[Span], FloatArray]],
    nlls: Sequence[FloatArray],
) -> list[Sample]:
    return [
        {
            "task": "retrieval_perplexity",
            "method": method,
            "k": k,
            "document": w.document,
            "span": [w.start, w.stop],
            "first_scored": w.first,
            "passages": [list(span[:2]) for span in spans[:k]],
            "scores": [round(float(s), 4) for s in scores[:k]],
            "nll": float(nll.mean()),
        }
        for w, (spans, scores), nll in zip(windows, found, nlls, strict=True)
    ]


def retrieval_figure(models: Sequence[Results], path: Path) -> str:
    """Perplexity against tokens of retrieved passages, with RePlug.

    Args:
        models: contents of `results.json` that hold the task.
        path: PNG to write.

    Returns:
        The file's name.
    """
    parts = [(result_of(m, "retrieval_perplexity") or {})["rows"] for m in models]
    figure, axes = perplexity_by(models, parts, "method", LINES)
    axes.set_xlabel("retrieved passages, tokens")
    axes.set_title("Perplexity with retrieved passages", fontsize=11)
    legend(figure)
    return save(figure, path)
