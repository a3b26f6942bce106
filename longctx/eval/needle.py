"""Needle map: one fact in real text, over prompt length x depth, scored without a judge.

`The special magic number of {city} is {number}.` stands after a sentence of the text, the prompt
ends with the beginning of the same words, and the number must follow, token by token: so one
forward pass a prompt tells what greedy decoding would say (`teacher_forced`; `generate` does decode
and must agree). Depth counts sentences. Same cost as a passkey of that length.
Source: after Kamradt's needle in a haystack; scored as RULER's, by the value.
"""

from functools import partial
from itertools import takewhile
from random import Random
from typing import Any

from longctx.data.passkey_text import Encode, Passkey
from longctx.errors import UserError
from longctx.eval.ask import check_vocabulary, largest
from longctx.eval.config import EvalConfig
from longctx.eval.haystack import Haystack, haystack, identity, require_sentences
from longctx.eval.passkey import Quiz, passkey
from longctx.eval.subject import Subject, TaskResult

HEAD = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will "
    "quiz you about the number afterwards."
)
FACT = "The special magic number of {city} is {number}."
QUESTION = "What is the special magic number of {city}? The special magic number of {city} is"
# fmt: off
CITIES = (
    "Amsterdam", "Athens", "Berlin", "Cairo", "Chicago", "Dublin", "Geneva", "Havana", "Istanbul",
    "Lima", "Lisbon", "London", "Madrid", "Mumbai", "Nairobi", "Oslo", "Paris", "Prague", "Rome",
    "Santiago", "Seoul", "Sydney", "Tokyo", "Toronto", "Vienna", "Warsaw",
)
# fmt: on


def hide(
    hay: Haystack,
    encode: Encode,
    bos_id: int | None,
    length: int,
    depth: float,
    seed: int,
    index: int,
) -> Passkey:
    """A prompt of at most, and nearly, `length` tokens with the fact at relative `depth`.

    Args:
        hay: text; it and the number are fixed by all that follows.
        encode: text -> ids, without special tokens.
        bos_id: put in front; None: nothing.
        length: most tokens, the answer and BOS included.
        depth: share of the sentences that stand before the fact, 0 to 1.
        seed: with `length`, `depth` and `index`, fixes the draw.
        index: number of the sample.

    Raises:
        UserError: if `length` holds no sentence, or there is no text of it.
    """
    draw = Random(f"{seed}/needle/{length}/{float(depth)}/{index}")
    city, number = draw.choice(CITIES), str(draw.randint(10**6, 10**7 - 1))
    text = require_sentences(hay.draw(length, draw), length, hay.name)
    fact, question = FACT.format(city=city, number=number), QUESTION.format(city=city)
    front = [] if bos_id is None else [bos_id]

    def before(size: int) -> str:
        shown = " ".join(text[: round(depth * size)])
        return f"{HEAD}\n{shown} " if shown else f"{HEAD}\n"

    def encoded(size: int, answer: str = "") -> list[int]:
        after = " ".join([fact, *text[round(depth * size) : size]])
        return front + encode(f"{before(size)}{after}\n{question}{answer}")

    size = largest(lambda n: len(encoded(n, f" {number}")) <= length, 1, len(text))
    if size is None:
        raise UserError(
            f"needle: lengths={length}, depth {depth}, sample {index}: one sentence makes "
            f"{len(encoded(1, f' {number}'))} tokens: a larger length"
        )
    prompt, whole = encoded(size), encoded(size, f" {number}")
    same = (a == b for a, b in zip(prompt, whole, strict=False))
    start = sum(takewhile(bool, same))  # a tokenizer may join the prompt's end and the answer
    distance = len(prompt) - len(front) - len(encode(before(size).rstrip(" ")))
    return Passkey(whole, (start, len(whole)), number, distance)


def inputs(cfg: EvalConfig) -> dict[str, Any]:
    """What the numbers depend on beside the settings.

    Raises:
        UserError: if there is no such text.
    """
    return {"text": identity(cfg, cfg.needle.haystack), "seed": cfg.seed}


def run(cfg: EvalConfig, subject: Subject) -> TaskResult:
    """The task: every length with every depth.

    Args:
        cfg: the evaluation.
        subject: the model under test and its tokenizer.

    Returns:
        The result (`cells`: one row each) and one record a prompt.

    Raises:
        UserError: if there is no such text, or a prompt does not fit.
    """
    own, bos = cfg.needle, subject.tokenizer.bos_token_id
    hay = haystack(cfg, subject, own.haystack)

    def encode(text: str) -> list[int]:
        found = subject.encode(text)
        check_vocabulary(subject, max(found, default=0))
        return found

    quiz = Quiz(
        subject.model,
        encode,
        bos,
        own.samples,
        cfg.seed,
        own.mode,
        cfg.batch_tokens,
        subject.journal,
    )
    result, records = passkey(
        quiz, sorted(cfg.lengths), own.depths, task="needle", write=partial(hide, hay)
    )
    return result | {"haystack": own.haystack}, records
