"""The loader of rows with contexts: which windows of which stores, in which shares.

Two kinds of windows stand beside each other: those inside single documents long enough for context
and row, and those of the joined stream of all documents. Each kind is one shuffled corpus, or with
weights a source for each store. Costs what the plans of windows take.
Source: CEPE (2402.16617), "RPtrain-filter" and "RPtrain-cat", drawn 2:1 by its main stage.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from longctx.config.data import ContextsConfig, DataConfig
from longctx.data.context_windows import WindowRows, in_documents, in_stream, warm_up
from longctx.data.corpus import Corpus, Documents
from longctx.data.loader import Change, RowLoader
from longctx.errors import UserError

SETTINGS = ("count", "size", "repeat", "documents", "stream", "mask", "mask_whole")


@dataclass(frozen=True)
class Stores:
    """Opened token stores of one kind of windows.

    Args:
        name: of the setting that holds their paths, for messages.
        stores: in the order of those paths.
        weights: share of each. None: all are one shuffled corpus.
    """

    name: str
    stores: Sequence[Documents]
    weights: Sequence[float] | None

    def corpora(self) -> list[tuple[str, Corpus, float]]:
        """(name, documents, weight) of each source of rows."""
        if self.weights is None:
            return [(self.name, Corpus(self.stores), 1.0)]
        parts = zip(self.stores, self.weights, strict=True)
        return [(f"{self.name}[{i}]", Corpus([s]), w) for i, (s, w) in enumerate(parts)]


def windowed(
    documents: Stores,
    stream: Stores,
    data: DataConfig,
    contexts: ContextsConfig,
    *,
    batch_rows: int,
    micro_batch_rows: int,
    seed: int,
    change: Change | None = None,
) -> RowLoader:
    """The loader of windows: rows of `data.seq_len` tokens, with their contexts if there are any.

    Args:
        documents: where windows inside single documents are cut.
        stream: where windows of the joined stream are cut.
        data: the row length; masks of what the loader hides are `change`'s.
        contexts: how many, how long, and the shares of the two kinds.
        batch_rows: rows per step over all ranks.
        micro_batch_rows: rows per rank and micro-batch.
        seed: of the streams' shuffles and of the order.
        change: what is done to each row, see `RowLoader`.

    Raises:
        UserError: if a source holds no window, or a setting does not apply to windows.
    """
    _check(data)
    sources: list[WindowRows] = []
    weights: list[float] = []
    identity = {"seed": str(seed)} | {
        f"data.{key}": str(getattr(data, key)) for key in ("seq_len", "mask_rate")
    }
    identity |= {f"contexts.{key}": str(getattr(contexts, key)) for key in SETTINGS}
    kinds = [("documents", contexts.documents, documents), ("stream", contexts.stream, stream)]
    used = [(kind, share, stores) for kind, share, stores in kinds if share]
    for at, (kind, share, stores) in enumerate(used):
        digests = [str(s.meta["digest"]) for s in stores.stores]
        identity |= {f"{kind}[{i}]": digest for i, digest in enumerate(digests)}
        identity |= {f"{kind}.weights": str(stores.weights)}
        # Shares times the other kind's total weight: whole numbers stay whole, unlike quotients.
        other = sum(w for _, _, w in used[1 - at][2].corpora()) if len(used) > 1 else 1.0
        for name, corpus, weight in stores.corpora():
            sources.append(_rows(corpus, data.seq_len, contexts, kind, seed, name))
            weights.append(share * weight * other)
    return RowLoader(
        sources,
        weights,
        batch_rows=batch_rows,
        micro_batch_rows=micro_batch_rows,
        seed=seed,
        identity=identity,
        change=change,
    )


def few(contexts: ContextsConfig, seq_len: int) -> ContextsConfig:
    """At most 4 short contexts, of one store, for a check on rows of `seq_len` tokens."""
    if not contexts.count:
        return contexts
    count = min(contexts.count, 4)
    size = seq_len // (count if contexts.repeat else 4)
    return replace(contexts, count=count, size=size, stream_store=[], stream_weights=None)


def _check(data: DataConfig) -> None:
    """Raises UserError for settings that windows do not have."""
    if data.packing != "concat":
        raise UserError(f"data.packing={data.packing}: windows of a text are cut; use concat")
    if data.mask_documents:
        raise UserError("data.mask_documents=true: windows are one stream each; use false")
    if data.long_tokens is not None:
        raise UserError("data.long_tokens does not apply here: contexts.documents takes long ones")


def _rows(
    corpus: Corpus, decoder: int, contexts: ContextsConfig, kind: str, seed: int, name: str
) -> WindowRows:
    before = 0 if contexts.repeat else contexts.tokens
    lengths = corpus.lengths
    if kind == "documents":
        plan = in_documents(lengths, before, decoder)
        what = f"has no document of {before + decoder:,} tokens"
    else:
        plan = in_stream(lengths, before, decoder, seed)
        what = f"holds {int(lengths.sum()):,} tokens, less than {before + decoder:,}"
    if not len(plan):
        raise UserError(
            f"{name} {what}: contexts of {before:,} and a row of data.seq_len={decoder:,}"
        )
    where = "inside long documents" if kind == "documents" else "one stream"
    about = f"{name}: {len(lengths):,} documents, {where}, "
    return WindowRows(corpus, warm_up(plan) if contexts.repeat else plan, contexts.size or 1, about)
