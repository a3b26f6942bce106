"""Needle map: one fact in real text, over prompt length x depth, scored without a judge.

`The special magic number of {city} is {number}.` follows a sentence of the text, the prompt ends
with the beginning of the same words, and the number must follow, token by token. One forward pass
a prompt therefore shows what greedy decoding would write (`teacher_forced`; `generate` does decode
and must agree). Depth counts sentences. Same cost as a passkey of that length.
Source: after Kamradt's needle in a haystack; scored as RULER's, by the value.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from longctx.config.typed import choice, positive
from longctx.data.passkey_text import Encode, Passkey
from longctx.errors import UserError
from longctx.eval.ask import largest
from longctx.eval.evaluation import Evaluation
from longctx.eval.figures import WINDOWS, depth_maps
from longctx.eval.haystack import KINDS, Haystack, haystack, identity, require_sentences
from longctx.eval.headline import Column, at_lengths, cells_of, share
from longctx.eval.quiz import MODES, check_depths, check_mode, found_at, grid, quiz_of
from longctx.eval.results import Results
from longctx.eval.subject import Subject, check_vocabulary
from longctx.eval.tables import image, percent, table, token_range
from longctx.eval.task import Found, Task, TaskResult

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


@dataclass(frozen=True)
class Needle(Task):
    """One fact hidden in real text, over length and depth.

    Args:
        depths: places of the fact, 0 (start of the text) to 1 (end).
        samples: prompts per cell, each with its own fact and text.
        haystack: `held_out` (documents of that store) `| essays` (those of `ruler.data`).
        mode: `teacher_forced` (one forward a prompt) `| generate` (through the cache).
    """

    place: ClassVar[int] = 50
    by_length: ClassVar[bool] = True

    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    samples: int = 3
    haystack: str = "held_out"
    mode: str = "teacher_forced"

    def __post_init__(self) -> None:
        positive(self.samples, "needle.samples")
        choice(self.haystack, KINDS, "needle.haystack")
        check_mode(self.mode, "needle.mode")
        check_depths(self.depths, "needle.depths")

    @property
    def of_a_store(self) -> bool:
        """Unless the text is essays."""
        return self.haystack == "held_out"

    @property
    def one_pass(self) -> bool:
        """Unless it decodes."""
        return self.mode == "teacher_forced"

    def inputs(self, cfg: Evaluation) -> dict[str, Any]:
        """The text and the seed."""
        return {"text": identity(cfg, self.haystack), "seed": cfg.seed}

    def run(self, cfg: Evaluation, subject: Subject) -> TaskResult:
        """The share found in each cell of length x depth, and one record a prompt."""
        hay = haystack(cfg, subject, self.haystack)

        def encode(text: str) -> list[int]:
            found = subject.encode(text)
            check_vocabulary(subject, max(found, default=0))
            return found

        quiz = replace(quiz_of(cfg, subject, self.mode, self.samples), encode=encode)
        write = partial(hide, hay)
        result, records = grid(quiz, sorted(cfg.lengths), self.depths, task=self.name, write=write)
        return result | {"haystack": self.haystack}, records

    @classmethod
    def section(cls, found: Found, out: Path) -> Iterator[str]:
        """Facts found by length, and a map of length x depth."""
        own = found[0][1]
        lengths = sorted({int(row["length"]) for _, result in found for row in result["cells"]})
        depths = len({c["depth"] for c in own["cells"]})
        yield from ("## Needle map", "")
        yield (
            f"One fact in real text ({own['haystack'].replace('_', '-')}), found to the letter, "
            f"per cent; mean over {depths} depths and {own['cells'][0]['samples']} prompts a cell, "
            f"{MODES[own['mode']]}; columns: tokens of the prompts; prompts truncated: 0; guessing:"
            " 0."
        )
        yield ""
        rows = []
        for model, result in found:
            rates: dict[int, list[float]] = {}
            for cell in result["cells"]:
                rates.setdefault(cell["length"], []).append(cell["rate"])
            means = {n: f"{100 * sum(r) / len(r):.1f}" for n, r in rates.items()}
            cells = [means.get(n, "") for n in lengths]
            rows.append([model["label"], *cells, token_range(result["cells"])])
        yield from table(["model", *(f"{n:,}" for n in lengths), "prompt tokens"], rows)
        figure = depth_maps([m for m, _ in found], cls.name, "fact", out / "needle.png")
        yield from image(f"Facts found; {WINDOWS}", figure)

    @classmethod
    def columns(cls, models: Sequence[Results]) -> Iterator[Column]:
        """The share of facts found, over all depths."""
        rows = [
            {n: share(*counts) for n, counts in found_at(cells_of(m, cls.name)).items()}
            for m in models
        ]
        yield from at_lengths(models, rows, "needle at {at}, %", percent)


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
        depth: share of the sentences before the fact, 0 to 1.
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
