"""Questions with their passages, read from three common layouts of JSON, and their prompts.

Layouts: SQuAD's (`data: [{title, paragraphs: [{context, qas}]}]`, unanswerable questions left out),
HotpotQA's (`[{question, answer, context: [[title, sentences]], supporting_facts}]`), and that of
retrievers (`[{question, answers, ctxs: [{title, text, score}]}]`). All distinct passages of a file
are one pool. Costs one reading of the file: a second for 50 MB.

Prompts: `Document (Title: {title}): {text}` for each passage in rank order, a blank line between
pieces, and at the end `Question: {question}` and `Answer:`; a demonstration is one passage, its
question and its answer. Of a model with an encoder, the decoder reads the first passages and the
encoder the rest, each a context of its own, or several where it is wider than the encoder's window
(the order of contexts is not seen); demonstrations and question stay in the decoder. Nothing is
ever truncated. Costs one tokenisation a prompt.
Source: CEPE (2402.16617) section 4.3 and its code.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longctx.errors import UserError
from longctx.eval.answers import holds
from longctx.eval.retrieve import Ranker

GAP = "\n\n"
LAYOUTS = "SQuAD's, HotpotQA's, or a list of {question, answers, ctxs: [{title, text, score}]}"


@dataclass(frozen=True)
class Passage:
    """A titled paragraph."""

    title: str
    text: str

    def __str__(self) -> str:
        """As it is written in a prompt."""
        return f"Document (Title: {self.title}): {self.text}"


@dataclass(frozen=True)
class Question:
    """A question, its accepted answers, and where they are.

    Args:
        identity: its name in the file, or its number.
        text: the question.
        answers: accepted, at least one.
        gold: passages that answer it, indices into the pool.
        given: passages by falling given score; None where the file has no scores.
    """

    identity: str
    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    given: tuple[int, ...] | None = None


@dataclass
class Pool:
    """All distinct passages, in the order of the file, and the questions."""

    passages: list[Passage] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    _known: dict[Passage, int] = field(default_factory=dict)

    def add(self, title: str, text: str) -> int:
        """Index of a passage, which is added if it is new."""
        passage = Passage(title, text)
        if passage not in self._known:
            self._known[passage] = len(self.passages)
            self.passages.append(passage)
        return self._known[passage]


def _squad(found: Any, pool: Pool) -> None:
    for article in found["data"]:
        title = article["title"].replace("_", " ")
        for paragraph in article["paragraphs"]:
            place = pool.add(title, paragraph["context"])
            for asked in paragraph["qas"]:
                answers = tuple(dict.fromkeys(a["text"] for a in asked["answers"]))
                if answers:
                    text = asked["question"].strip()
                    pool.questions.append(Question(asked["id"], text, answers, (place,)))


def _hotpot(found: Any, pool: Pool) -> None:
    for asked in found:
        facts = {title for title, _ in asked["supporting_facts"]}
        places = {title: pool.add(title, "".join(lines)) for title, lines in asked["context"]}
        gold = tuple(place for title, place in places.items() if title in facts)
        answers = (asked["answer"],)
        pool.questions.append(Question(asked["_id"], asked["question"], answers, gold))


def _retrieved(found: Any, pool: Pool) -> None:
    for number, asked in enumerate(found):
        answers = tuple(asked["answers"])
        if not answers:
            raise KeyError("answers")
        entries = asked["ctxs"]
        places = [pool.add(entry.get("title", ""), entry["text"]) for entry in entries]
        gold = [p for p in dict.fromkeys(places) if holds(pool.passages[p].text, answers)]
        given = None
        if all("score" in entry for entry in entries):
            order = sorted(range(len(entries)), key=lambda i: -float(entries[i]["score"]))
            given = tuple(dict.fromkeys(places[i] for i in order))
        identity = str(asked.get("id", number))
        pool.questions.append(Question(identity, asked["question"], answers, tuple(gold), given))


def _layout(found: Any) -> Callable[[Any, Pool], None]:
    if isinstance(found, dict) and "data" in found:
        return _squad
    if isinstance(found, list) and found and isinstance(found[0], dict):
        return _hotpot if "supporting_facts" in found[0] else _retrieved
    raise KeyError("data")


def _bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"qa.data={path}: no such file (bash data_prep/qa_data.sh has some)"
        ) from error


def digest(path: str) -> str:
    """A short hash of the file.

    Raises:
        UserError: if there is no such file.
    """
    return hashlib.sha256(_bytes(path)).hexdigest()[:16]


def read(path: str) -> Pool:
    """Reads questions and passages.

    Args:
        path: JSON file in one of the three layouts.

    Raises:
        UserError: if there is no such file, or it has no such layout.
    """
    try:
        found = json.loads(_bytes(path))
    except ValueError as error:
        raise UserError(f"qa.data={path}: not readable JSON") from error
    pool = Pool()
    try:
        _layout(found)(found, pool)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"qa.data={path}: its layout is none of {LAYOUTS} ({error!r})") from error
    if not pool.questions:
        raise UserError(f"qa.data={path}: no question with an answer")
    return pool


@dataclass(frozen=True)
class Ranked:
    """The best passages for a question.

    Args:
        best: whatever they hold, best first.
        others: those of them that are not gold and hold no answer, best first.
    """

    best: tuple[int, ...]
    others: tuple[int, ...]


def rank(pool: Pool, questions: Sequence[Question], ranking: str, k: int) -> list[Ranked]:
    """The best k passages for each question.

    Args:
        pool: passages.
        questions: of the pool.
        ranking: `bm25` over the whole pool, or `given` by the file.
        k: how many of each kind.

    Raises:
        UserError: if the file gives no scores, or there are fewer than k.
    """
    ranker = Ranker([str(p) for p in pool.passages]) if ranking == "bm25" else None
    result = []
    for question in questions:
        if ranker is not None:
            order: Sequence[int] = ranker.ranked(question.text)[0].tolist()
        elif question.given is not None:
            order = question.given
        else:
            raise UserError("qa.ranking=given needs a score for each passage: qa.ranking=bm25")
        others: list[int] = []
        for place in order:
            if len(others) == k:
                break
            if place not in question.gold and not holds(
                str(pool.passages[place]), question.answers
            ):
                others.append(place)
        result.append(Ranked(tuple(order[:k]), tuple(others)))
    return result


@dataclass(frozen=True)
class Prompt:
    """One question with its passages.

    Args:
        passages: places in the pool, in the order read.
        in_decoder: how many of them the decoder reads; the encoder reads the others.
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
