"""Prompts that are answered freely: filled up to a length, decoded greedily, recorded.

Lengths are in the model's own tokens, with BOS and the room for the answer. A prompt is never cut:
what grows is the number of its units of filler, and one that is too long with the fewest of them is
an error that names it. A model with an encoder reads in its decoder what fits there and before that
in the encoder, window by window. Costs a dozen tokenisations a cell, one or two a prompt.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

from longctx.errors import UserError
from longctx.eval.score import context_window, evaluating, greedy, has_encoder
from longctx.eval.subject import Subject, check_vocabulary
from longctx.eval.task import Sample

CONTROL = re.compile(r"[\x00-\x1f]")
SHOWN = 240  # characters of either end of a prompt in its record
SHRINK = 50  # a prompt that comes out too long loses 1/50 of its units at a time


@dataclass(frozen=True)
class Prompt:
    """One question with its text.

    Args:
        text: all that is read.
        start: how the answer starts; given to the model.
        answers: what is looked for in the rest.
        evidence: the pieces of `text` that hold it.
        facts: more columns of its record.
    """

    text: str
    start: str
    answers: tuple[str, ...]
    evidence: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """Writes prompts with any number of units of filler."""

    @property
    def least(self) -> int:
        """The fewest units."""
        ...

    @property
    def most(self) -> int:
        """The most units."""
        ...

    def write(self, size: int, index: int, draw: Random) -> Prompt:
        """Prompt number `index` with `size` units; the same for the same draw."""
        ...


@dataclass(frozen=True)
class Reader:
    """What the model reads of a prompt.

    Args:
        subject: model and tokenizer.
        chat: the text is put into the tokenizer's chat template.
        key: setting that asked for it, for the error.
    """

    subject: Subject
    chat: bool = False
    key: str = "chat"

    def full(self, prompt: Prompt) -> str:
        """The whole text.

        Raises:
            UserError: if the tokenizer has no chat template.
        """
        if not self.chat:
            return prompt.text + prompt.start
        tokenizer = self.subject.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(f"{self.key}=true: the tokenizer has no chat template")
        turn = [{"role": "user", "content": prompt.text}]
        made = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return str(made) + prompt.start

    def tokens(self, prompt: Prompt) -> list[int]:
        """Its tokens behind one BOS, where the tokenizer has any.

        Raises:
            UserError: if the tokenizer is another model's.
        """
        bos = self.subject.tokenizer.bos_token_id
        found = self.subject.encode(self.full(prompt))
        if bos is not None and found[:1] != [bos]:
            found = [bos, *found]
        check_vocabulary(self.subject, max(found))
        return found


def largest(fits: Callable[[int], bool], least: int, most: int) -> int | None:
    """The largest size that fits, if larger ones never do where smaller ones do not.

    Args:
        fits: of a size.
        least: the smallest allowed.
        most: the largest allowed.

    Returns:
        It, or None if not even the smallest fits. `fits` is asked some 2 log2(size) times.
    """
    if not fits(least):
        return None
    low, step = least, 1
    while low < most and fits(min(low + step, most)):
        low = min(low + step, most)
        step *= 2
    high = min(low + step, most + 1)  # does not fit
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class Cell:
    """All prompts of one kind and length.

    Args:
        task: the evaluation's task, for records and errors.
        kind: within the task.
        source: writes them.
        reader: counts their tokens.
        length: most tokens, BOS and answer included.
        new_tokens: most tokens of the answer.
        seed: of the draw, with task, kind, length and index.
    """

    task: str
    kind: str
    source: Source
    reader: Reader
    length: int
    new_tokens: int
    seed: int

    def _write(self, size: int, index: int) -> Prompt:
        draw = Random(f"{self.seed}/{self.task}/{self.kind}/{self.length}/{index}")
        return self.source.write(size, index, draw)

    def _over(self, prompt: Prompt) -> int:
        return len(self.reader.tokens(prompt)) + self.new_tokens - self.length

    def size(self, samples: int) -> int:
        """Units of filler that the first prompt has room for.

        Args:
            samples: how many prompts are to be asked.

        Raises:
            UserError: if one of them does not fit with the fewest.
        """
        source = self.source
        for index in range(samples):
            shortest = self._write(source.least, index)
            if self._over(shortest) > 0:
                raise self._too_long(index, shortest)
        found = largest(lambda n: self._over(self._write(n, 0)) <= 0, source.least, source.most)
        assert found is not None, "the shortest fits"
        return found

    def _too_long(self, index: int, prompt: Prompt) -> UserError:
        tokens = self._over(prompt) + self.length - self.new_tokens
        return UserError(
            f"{self.task}: {self.kind}, sample {index}: its shortest prompt of {tokens:,} tokens "
            f"and {self.new_tokens} for the answer exceed lengths={self.length:,}: a larger length"
        )

    def prompt(self, size: int, index: int) -> Prompt:
        """Prompt number `index`, of about `size` units: what `size` of this cell gave."""
        prompt = self._write(size, index)
        while self._over(prompt) > 0:
            assert size > self.source.least, "size() was asked for fewer prompts"
            size = max(self.source.least, size - max(1, size // SHRINK))
            prompt = self._write(size, index)
        return prompt

    def ask(self, size: int, index: int, score: Callable[[str, tuple[str, ...]], float]) -> Sample:
        """Answers a prompt; its record."""
        prompt = self.prompt(size, index)
        tokens = self.reader.tokens(prompt)
        subject, new_tokens = self.reader.subject, self.new_tokens
        contexts, rest = divide(subject.model, tokens, new_tokens)
        with evaluating(subject.model):
            found = subject.decode(greedy(subject.model, rest, new_tokens, contexts))
        prediction = CONTROL.sub("\n", found.strip()).strip()
        text = self.reader.full(prompt)
        spans = [(at, at + len(e)) for e in prompt.evidence if (at := text.rfind(e)) >= 0]
        return {
            "task": self.task,
            "kind": self.kind,
            "length": self.length,
            "index": index,
            "seed": self.seed,
            "tokens": len(tokens),
            "context_tokens": sum(map(len, contexts)),
            "characters": len(text),
            "evidence": spans,
            "starts": text[:SHOWN],
            "ends": text[-SHOWN:],
            # One prompt of each cell in full; the seed makes the others again.
            "prompt": text if index == 0 else None,
            "answers": list(prompt.answers),
            "prediction": prediction,
            "score": score(prediction, prompt.answers),
            **prompt.facts,
        }


def is_of(record: Sample, kind: str, length: int) -> bool:
    """Whether a record belongs to the cell of this kind and length."""
    return (record["kind"], record["length"]) == (kind, length)


def divide(model: Any, tokens: list[int], new_tokens: int) -> tuple[list[list[int]], list[int]]:
    """What the encoder reads, window by window, and what the decoder reads; nothing is lost.

    Raises:
        UserError: if the answer alone fills the decoder's window.
    """
    widest = context_window(model)
    if widest is None or not has_encoder(model):
        return [], tokens
    window = int(model.config.max_position_embeddings)
    if (room := window - new_tokens) < 1:
        raise UserError(
            f"the decoder's window of {window} has no room for {new_tokens} tokens of an answer"
        )
    before, rest = tokens[: max(0, len(tokens) - room)], tokens[max(0, len(tokens) - room) :]
    return [before[i : i + widest] for i in range(0, len(before), widest)], rest
