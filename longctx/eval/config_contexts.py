"""Settings of the tasks that read contexts: perplexity behind a context, retrieval, and QA.

Values stand in `conf/effort/`, not here.
"""

from dataclasses import dataclass

from longctx.config.typed import choice, positive
from longctx.errors import UserError

CONTEXT_PROTOCOLS = ("cepe_tail_matched", "cepe_tail")
RANKINGS = ("bm25", "given")
PLACES = ("first", "middle", "last")
QA_SETTINGS = ("retrieved", *PLACES, "gold_only", "no_gold")


def counts(values: list[int], key: str, least: int) -> None:
    """Raises UserError unless `values` are different numbers of at least `least`."""
    if not values or min(values) < least or len(set(values)) < len(values):
        raise UserError(f"{key}={list(values)} must be different numbers, each at least {least}")


@dataclass(frozen=True)
class ContextsConfig:
    """Perplexity behind a context; see `longctx/eval/contexts.py` for the protocols.

    Args:
        protocols: `cepe_tail_matched | cepe_tail`, one or both.
        counts: numbers of contexts, n; 0: the decoder alone.
        size: tokens in a context, l.
        decoder_tokens: tokens that the decoder reads for itself, D.
        target_tokens: tokens scored, the last of those, T.
        other: also measure with the context of another document.
        windows: at most so many samples per document.
        max_documents: documents scored, evenly spaced over the store. None: all long enough.
    """

    protocols: list[str]
    counts: list[int]
    size: int
    decoder_tokens: int
    target_tokens: int
    other: bool
    windows: int
    max_documents: int | None

    def __post_init__(self) -> None:
        for protocol in self.protocols:
            choice(protocol, CONTEXT_PROTOCOLS, "contexts.protocols")
        counts(self.counts, "contexts.counts", 0)
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


@dataclass(frozen=True)
class RetrievalConfig:
    """Perplexity with retrieved passages, and RePlug; see `longctx/eval/retrieval_perplexity.py`.

    Args:
        store: token store that passages are cut from. None: that of `held_out`.
        passages: numbers of passages read, k; 0: none.
        replug: numbers of passages for RePlug, one forward pass each. Empty: not measured.
        size: tokens in a passage.
        decoder_tokens: tokens that the decoder reads for itself, D.
        query_tokens: the first of those, which are the query and are not scored.
        temperature: of RePlug's softmax over scores.
        windows: at most so many samples per document.
        max_documents: documents scored, evenly spaced over the store. None: all long enough.
    """

    store: str | None
    passages: list[int]
    replug: list[int]
    size: int
    decoder_tokens: int
    query_tokens: int
    temperature: float
    windows: int
    max_documents: int | None

    def __post_init__(self) -> None:
        where = "retrieval_perplexity"
        counts(self.passages, f"{where}.passages", 0)
        if self.replug:
            counts(self.replug, f"{where}.replug", 1)
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


@dataclass(frozen=True)
class QaConfig:
    """Questions over k passages; see `longctx/eval/qa.py`.

    Args:
        data: JSON file of questions and passages: SQuAD's layout, HotpotQA's, or a list of
            `{question, answers, ctxs: [{title, text, score}]}`.
        ranking: `bm25` (over all passages of the file) `| given` (its scores).
        passages: numbers of passages, k.
        settings: which passages: `retrieved` (the k best), gold ones at the `first | middle |
            last` place among the best others, `gold_only`, `no_gold`; one or more.
        decoder_passages: of a model with an encoder, the decoder reads the first so many passages
            and the encoder the rest.
        demonstrations: solved examples in front, each with one passage.
        questions: at most so many are asked. None: all.
        new_tokens: most tokens of an answer.
        window: tokens that prompt and answer may take. None: the window the model claims.
    """

    data: str | None
    ranking: str
    passages: list[int]
    settings: list[str]
    decoder_passages: int
    demonstrations: int
    questions: int | None
    new_tokens: int
    window: int | None

    def __post_init__(self) -> None:
        choice(self.ranking, RANKINGS, "qa.ranking")
        for setting in self.settings:
            choice(setting, QA_SETTINGS, "qa.settings")
        if not self.settings:
            raise UserError(f"qa.settings=[] must name at least one of {', '.join(QA_SETTINGS)}")
        counts(self.passages, "qa.passages", 1)
        for key in ("questions", "new_tokens", "window"):
            if (value := getattr(self, key)) is not None:
                positive(value, f"qa.{key}")
        for key in ("decoder_passages", "demonstrations"):
            if getattr(self, key) < 0:
                raise UserError(f"qa.{key}={getattr(self, key)} must be at least 0")
