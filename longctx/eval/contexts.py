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

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from longctx.data.store import Store
from longctx.errors import UserError
from longctx.eval.config import EvalConfig
from longctx.eval.config_contexts import ContextsConfig
from longctx.eval.context import has_encoder
from longctx.eval.journal import Journal
from longctx.eval.perplexity import choose_documents, matched_ends
from longctx.eval.subject import Sample, Subject, TaskResult, open_store
from longctx.eval.windows import Documents, FloatArray, Window, evenly, mean_over, score_windows

End = tuple[int, int]  # document, one past the last token of a decoder window


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
    own: ContextsConfig
    batch_tokens: int
    journal: Journal = field(default_factory=Journal)

    def nll(self, model: nn.Module, windows: Sequence[Window], title: str) -> list[FloatArray]:
        """Scores windows; see `longctx.eval.windows.score_windows`."""
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


def windows_behind(own: ContextsConfig, ends: Sequence[End], count: int, kind: str) -> list[Window]:
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


def _chosen(cfg: EvalConfig) -> tuple[Store, list[int], int]:
    """The store, the documents to score, and how many were too short."""
    own, store = cfg.contexts, open_store(cfg)
    asked = f"contexts.counts of {own.size} tokens behind {own.decoder_tokens} ask"
    found = choose_documents(store, own.longest, own.max_documents, str(store.path), asked)
    if own.other and max(own.counts) and len(found[0]) < 2:
        raise UserError(
            f"{store.path} has one document of {own.longest} tokens or more: contexts of another "
            "document need two; use smaller contexts.counts, or contexts.other=false"
        )
    return store, *found


def inputs(cfg: EvalConfig) -> dict[str, Any]:
    """What the numbers depend on beside the settings.

    Raises:
        UserError: if the store cannot be used as asked.
    """
    return {"held_out": _chosen(cfg)[0].meta["digest"][:16]}


def run(cfg: EvalConfig, subject: Subject) -> TaskResult:
    """The task: every protocol asked for.

    Args:
        cfg: the evaluation.
        subject: the model under test.

    Returns:
        Results by protocol, and one record a sample.
    """
    own = cfg.contexts
    store, chosen, skipped = _chosen(cfg)
    plan = Plan(store, chosen, own, cfg.batch_tokens, subject.journal)
    common = {
        "bos": "document_start",
        "documents": len(chosen),
        "skipped": skipped,
        "size": own.size,
        "decoder_tokens": own.decoder_tokens,
        "target_tokens": own.target_tokens,
        "contexts_read_by": "encoder" if has_encoder(subject.model) else "decoder",
    }
    protocols, records = {}, []
    for protocol in own.protocols:
        result, found = measure(subject.model, plan, protocol)
        protocols[protocol] = common | result
        records += found
    return {"protocols": protocols}, records
