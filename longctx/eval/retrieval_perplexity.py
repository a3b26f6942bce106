"""Perplexity with k retrieved passages, and RePlug as the baseline.

The decoder reads D tokens; the first of them are the query and the rest is scored, the same tokens
under every k. Passages are pieces of equal size of other documents, ranked by BM25 and read best
first: by the encoder if the model has one, else in front of the decoder's tokens. Costs one forward
pass a sample and k.

RePlug (2301.12652) reads each passage in front of a copy of the input and mixes the probabilities
with the softmax of the retriever's scores: k forward passes of one passage each. The mixture is
formed in log space. It needs no training, so it is that of the decoder alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from longctx.data.store import Store
from longctx.eval.bm25 import Ranker
from longctx.eval.config import EvalConfig
from longctx.eval.config_contexts import RetrievalConfig
from longctx.eval.context import has_encoder
from longctx.eval.journal import Journal
from longctx.eval.perplexity import choose_documents, matched_ends
from longctx.eval.retrieve import Retriever, Span, cut, same_documents
from longctx.eval.subject import Sample, Subject, TaskResult, open_store
from longctx.eval.windows import Documents, FloatArray, Window, mean_over, score_windows


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
        """See `longctx.eval.windows.score_windows`."""
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
    own: RetrievalConfig,
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


def _stores(cfg: EvalConfig) -> tuple[Store, list[int], int, Store]:
    """The store, documents to score, how many were too short, and the store of passages."""
    own, store = cfg.retrieval_perplexity, open_store(cfg)
    passages = store if own.store is None else open_store(cfg, own.store)
    asked = "retrieval_perplexity.decoder_tokens asks"
    chosen, skipped = choose_documents(
        store, own.decoder_tokens, own.max_documents, str(store.path), asked
    )
    return store, chosen, skipped, passages


def inputs(cfg: EvalConfig) -> dict[str, Any]:
    """What the numbers depend on beside the settings.

    Raises:
        UserError: if a store cannot be used as asked.
    """
    store, _, _, passages = _stores(cfg)
    return {"held_out": store.meta["digest"][:16], "store": passages.meta["digest"][:16]}


def run(cfg: EvalConfig, subject: Subject) -> TaskResult:
    """The task: the model with k passages for each k, and RePlug.

    Args:
        cfg: the evaluation.
        subject: the model under test.

    Returns:
        The result, and one record a sample.

    Raises:
        UserError: if other documents have too few passages.
    """
    own = cfg.retrieval_perplexity
    store, chosen, skipped, passages = _stores(cfg)
    spans = cut(passages, own.size)
    texts = [subject.decode(passages.tokens(*span).tolist()) for span in spans]
    retriever = Retriever(passages, spans, Ranker(texts), subject.decode)
    scored = own.decoder_tokens - own.query_tokens
    windows = [
        Window(i, end - own.decoder_tokens, end, end - scored)
        for i, end in matched_ends(store, chosen, own.decoder_tokens, scored, own.windows)
    ]
    same = same_documents(store, passages)
    k = max([*own.passages, *own.replug])
    found = []
    for w in windows:
        query = store.tokens(w.document, w.start, w.first).tolist()
        found.append(retriever.best(query, k, same[w.document]))
    reader = Reader(subject.model, store, passages, cfg.batch_tokens, subject.journal)
    result, records = measure(reader, own, windows, found)
    common = {
        "bos": "document_start",
        "documents": len(chosen),
        "skipped": skipped,
        "pool": len(spans),
        "size": own.size,
        "decoder_tokens": own.decoder_tokens,
        "target_tokens": scored,
        "temperature": own.temperature,
        "contexts_read_by": "encoder" if has_encoder(subject.model) else "decoder",
    }
    return common | result, records
