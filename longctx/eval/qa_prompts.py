"""Prompts of k-passage question answering: demonstrations, passages, the question.

`Document (Title: {title}): {text}` for each passage, a blank line between pieces, and at the end
`Question: {question}` and `Answer:`; a demonstration is one passage, its question and its answer.
Passages stand in rank order. Of a model with an encoder, the decoder reads the first of them and
the encoder the rest, each a context of its own, or several where it is wider than the encoder's
window (the order of contexts is not seen); demonstrations and question stay in the decoder.
Nothing is ever truncated. Costs one tokenisation a prompt.
Source: CEPE (2402.16617) section 4.3 and its code.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from longctx.errors import UserError
from longctx.eval.config_contexts import PLACES, QaConfig
from longctx.eval.qa_data import Pool, Question, Ranked

GAP = "\n\n"


@dataclass(frozen=True)
class Cell:
    """One row of the result: which passages, and how many; None with `gold_only`."""

    setting: str
    k: int | None


@dataclass(frozen=True)
class Prompt:
    """One question with its passages.

    Args:
        passages: places in the pool, in the order read.
        in_decoder: the decoder reads the first so many, the encoder the others.
        text: what the decoder reads.
        tokens: of that text, BOS included.
        contexts: tokens of each context that the encoder reads.
        cut: passages that are several contexts.
        gold_spans: characters `[start, stop]` of `text` at which gold passages stand.
    """

    passages: tuple[int, ...]
    in_decoder: int
    text: str
    tokens: list[int]
    contexts: list[list[int]]
    cut: int
    gold_spans: list[tuple[int, int]]


def cells(own: QaConfig) -> list[Cell]:
    """All rows asked for."""
    return [
        Cell(setting, k)
        for setting in own.settings
        for k in ((None,) if setting == "gold_only" else sorted(own.passages))
    ]


def choose(pool: Pool, own: QaConfig, seed: int) -> tuple[list[Question], list[Question]]:
    """Demonstrations, and questions that share no passage with them.

    Args:
        pool: the questions of a file.
        own: how many of both.
        seed: of the draw.

    Raises:
        UserError: if there are too few.
    """
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(pool.questions))
    drawn = [pool.questions[i] for i in order]
    shown = [q for q in drawn if q.gold][: own.demonstrations]
    used = {place for q in shown for place in q.gold}
    names = {q.identity for q in shown}
    needs_gold = any(setting != "retrieved" for setting in own.settings)
    asked = [
        q
        for q in drawn
        if q.identity not in names and not used & set(q.gold) and (q.gold or not needs_gold)
    ]
    if len(shown) < own.demonstrations or not asked:
        raise UserError(
            f"qa.data={own.data} has too few questions with a passage that answers them for "
            f"qa.demonstrations={own.demonstrations} and one question more"
        )
    return shown, asked[: own.questions]


def passages_of(cell: Cell, question: Question, ranked: Ranked) -> tuple[int, ...]:
    """Which passages are read, in order.

    Args:
        cell: setting and k.
        question: with its gold passages.
        ranked: the best others.

    Raises:
        UserError: if k does not hold the gold passages, or there are too few others.
    """
    gold, k = question.gold, cell.k
    if k is None:
        return gold
    if cell.setting in PLACES and k < len(gold):
        raise UserError(
            f"question {question.identity} has {len(gold)} gold passages, and qa.passages={k} "
            f"holds no more than {k}: larger qa.passages, or leave out qa.settings={cell.setting}"
        )
    needed = k - len(gold) if cell.setting in PLACES else k
    found = (ranked.best if cell.setting == "retrieved" else ranked.others)[:needed]
    if len(found) < needed:
        raise UserError(
            f"question {question.identity} has {len(found)} passages to choose from in "
            f"qa.settings={cell.setting}, and qa.passages={k} needs {needed}"
        )
    if cell.setting not in PLACES:
        return found
    at = {"first": 0, "middle": needed // 2, "last": needed}[cell.setting]
    return (*found[:at], *gold, *found[at:])


@dataclass(frozen=True)
class Writer:
    """Makes prompts.

    Args:
        pool: passages.
        demonstrations: in front of each question.
        in_decoder: passages that the decoder reads at most; None: all of them.
        encode: text to tokens, no special tokens added.
        bos_id: first token of every prompt; None: nothing.
        widest: tokens in one context; None: no limit.
    """

    pool: Pool
    demonstrations: Sequence[Question]
    in_decoder: int | None
    encode: Callable[[str], list[int]]
    bos_id: int | None
    widest: int | None = None

    def write(self, question: Question, passages: tuple[int, ...]) -> Prompt:
        """The prompt of one question.

        Args:
            question: what is asked.
            passages: places in the pool.
        """
        split = len(passages) if self.in_decoder is None else min(self.in_decoder, len(passages))
        texts = [str(self.pool.passages[p]) for p in passages]
        start = sum(len(piece) + len(GAP) for piece in self._demonstrations())
        spans = []
        for place, text in zip(passages[:split], texts, strict=False):
            if place in question.gold:
                spans.append((start, start + len(text)))
            start += len(text) + len(GAP)
        asked = f"Question: {question.text}\nAnswer:"
        text = GAP.join([*self._demonstrations(), *texts[:split], asked])
        front = [] if self.bos_id is None else [self.bos_id]
        pieces = [self._pieces(self.encode(t)) for t in texts[split:]]
        contexts = [context for passage in pieces for context in passage]
        cut = sum(len(passage) > 1 for passage in pieces)
        return Prompt(passages, split, text, front + self.encode(text), contexts, cut, spans)

    def _pieces(self, tokens: list[int]) -> list[list[int]]:
        """A passage as contexts that the encoder can read."""
        size = self.widest or len(tokens)
        return [tokens[i : i + size] for i in range(0, len(tokens), size)] if tokens else [tokens]

    def _demonstrations(self) -> Iterator[str]:
        for q in self.demonstrations:
            yield str(self.pool.passages[q.gold[0]])
            yield f"Question: {q.text}\nAnswer: {q.answers[0]}"
