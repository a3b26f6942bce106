"""The part of a typed run that says what is read: stores, rows, and contexts beside them.

Values stand in `conf/`; a default is what versions without that setting did.
"""

from dataclasses import dataclass, field

from longctx.config.typed import choice, positive
from longctx.errors import UserError


@dataclass(frozen=True)
class DataConfig:
    """Token stores and how rows are made of them.

    Args:
        store: token-store directories to train on.
        held_out: token-store directories for periodic evaluation; empty: none.
        seq_len: row length s, tokens.
        packing: `concat` (documents joined and cut, as the papers do) or `best_fit` (whole
            documents; only those longer than a row are cut).
        mask_documents: attention stays inside a document (positions restart at each).
        weights: share of each store in the training rows, in any unit. None: all stores are one
            shuffled corpus.
        long_tokens: up-sample documents of at least so many tokens, by leaving out shorter ones
            of the training stores. None: keep all.
        short_keep: probability that a document below `long_tokens` is kept.
        prefetch: steps whose rows are read in the background, ahead of training; 0: none.
        mask_rate: share of tokens that a masked language model has to guess. None: next tokens.
    """

    store: list[str]
    held_out: list[str]
    seq_len: int
    packing: str
    mask_documents: bool
    weights: list[float] | None = None
    long_tokens: int | None = None
    short_keep: float = 1.0
    prefetch: int = 0
    mask_rate: float | None = None

    def __post_init__(self) -> None:
        positive(self.seq_len, "data.seq_len")
        choice(self.packing, ("concat", "best_fit"), "data.packing")
        if self.weights is not None:
            if len(self.weights) != len(self.store):
                raise UserError(
                    f"data.weights has {len(self.weights)} numbers for "
                    f"{len(self.store)} directories in data.store: give one for each"
                )
            for i, weight in enumerate(self.weights):
                positive(weight, f"data.weights[{i}]")
                if weight == float("inf"):
                    raise UserError(f"data.weights[{i}]=inf must be finite")
        if self.long_tokens is not None:
            positive(self.long_tokens, "data.long_tokens")
        if not 0 <= self.short_keep <= 1:
            raise UserError(f"data.short_keep={self.short_keep} must be between 0 and 1")
        if self.prefetch < 0:
            raise UserError(f"data.prefetch={self.prefetch} must not be below 0")
        if self.mask_rate is not None and not 0 < self.mask_rate < 1:
            raise UserError(f"data.mask_rate={self.mask_rate} must be between 0 and 1")


@dataclass(frozen=True)
class ContextsConfig:
    """What an encoder reads beside each row, and from where rows with contexts are cut.

    Args:
        count: c, contexts of a row; 0: none.
        size: l, tokens per context.
        repeat: the contexts are the row's own tokens, not those before it (CEPE's warm-up).
        documents: share of rows cut from single documents that are long enough, in any unit; of
            the stores in `data.store`, at the weights in `data.weights`.
        stream: share of rows cut from the joined stream of documents, in the same unit.
        stream_store: token stores of that stream; empty: those in `data.store`, at their weights.
        stream_weights: share of each of them. None: all are one shuffled stream.
        mask: probability that a context is masked in training.
        mask_whole: of masked contexts, the share that is masked in full; others lose a random
            number of their last tokens.
    """

    count: int = 0
    size: int = 0
    repeat: bool = False
    documents: float = 0.0
    stream: float = 1.0
    stream_store: list[str] = field(default_factory=list)
    stream_weights: list[float] | None = None
    mask: float = 0.0
    mask_whole: float = 0.1

    def __post_init__(self) -> None:
        if self.count < 0:
            raise UserError(f"contexts.count={self.count} must not be below 0")
        if self.count:
            positive(self.size, "contexts.size")
        for key in ("documents", "stream"):
            if getattr(self, key) < 0:
                raise UserError(f"contexts.{key}={getattr(self, key)} must not be below 0")
        positive(self.documents + self.stream, "contexts.documents + contexts.stream")
        if self.stream_weights is not None and len(self.stream_weights) != len(self.stream_store):
            raise UserError(
                f"contexts.stream_weights has {len(self.stream_weights)} numbers for "
                f"{len(self.stream_store)} directories in contexts.stream_store: give one for each"
            )
        for key in ("mask", "mask_whole"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"contexts.{key}={getattr(self, key)} must be between 0 and 1")

    @property
    def tokens(self) -> int:
        """P = c x l, of one row."""
        return self.count * self.size
