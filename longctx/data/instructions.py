"""Small instructions in one fixed template, for a chat-like lab model and for measuring it.

    Question: What is the pass key of Emma?
    Answer: 48213
    Done.

and the document ends. Three kinds, whose one right answer can be checked to the letter: a key that
a passage before the question tells, a word to be repeated, the first or last of a list. A tenth of
all instructions, by a hash of their text, is held out: training texts leave exactly those out, and
an evaluation asks no others. Costs microseconds an instruction.
"""

import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from longctx.errors import UserError

QUESTION = "Question: {question}\n"
ANSWER = "Answer: {answer}\nDone."
REPLY = re.compile(r"Answer: ([^\n]*\S)\nDone\.")
HELD_OUT = 10  # one instruction in 10
PATIENCE = 1000  # draws without a new instruction
# fmt: off
NAMES = (
    "Emma", "Anne", "Henry", "John", "Mary", "George", "Edward", "Jane", "Harriet", "Frank",
    "Charles", "Louisa", "Robert", "Thomas", "William", "Fanny", "Edmund", "Julia", "Maria",
    "Susan", "Arthur", "Walter", "Alice", "Peter", "Paul", "Martha", "Ruth", "Samuel", "David",
    "Daniel", "Rachel", "Simon", "Andrew", "James", "Philip", "Lucy", "Helen",
)
# fmt: on
FACT = "The pass key of {name} is {key}."
ENDS = {"first": 0, "last": -1}
TIMES = {"twice": 2, "three times": 3}


@dataclass(frozen=True)
class Instruction:
    """What is asked, and the one right answer.

    Args:
        kind: `key | repeat | list`.
        passage: what is to be read first; may be empty.
        question: one line.
        answer: one line.
    """

    kind: str
    passage: str
    question: str
    answer: str

    @property
    def prompt(self) -> str:
        """All before the reply, with a newline at its end."""
        before = f"{self.passage}\n" if self.passage else ""
        return before + QUESTION.format(question=self.question)

    @property
    def text(self) -> str:
        """The whole document."""
        return self.prompt + ANSWER.format(answer=self.answer)

    @property
    def held_out(self) -> bool:
        """Whether it is for evaluation only."""
        return zlib.crc32(f"{self.question}\n{self.answer}".encode()) % HELD_OUT == 0


def _key(draw: random.Random) -> Instruction:
    names = draw.sample(NAMES, draw.randint(1, 3))
    keys = {name: str(draw.randint(10_000, 99_999)) for name in names}
    asked = draw.choice(names)
    passage = " ".join(FACT.format(name=name, key=key) for name, key in keys.items())
    return Instruction("key", passage, f"What is the pass key of {asked}?", keys[asked])


def _repeat(draw: random.Random) -> Instruction:
    (often, count), (word, *others) = draw.choice(list(TIMES.items())), draw.sample(NAMES, 3)
    question = f"Say {word} {often}, then {others[0]}, then {others[1]}."
    return Instruction("repeat", "", question, " ".join([word] * count + others))


def _list(draw: random.Random) -> Instruction:
    names, (end, at) = draw.sample(NAMES, draw.randint(2, 4)), draw.choice(list(ENDS.items()))
    question = f"Which name is the {end} one of {', '.join(names)}?"
    return Instruction("list", "", question, names[at])


KINDS: dict[str, Callable[[random.Random], Instruction]] = {
    "key": _key,
    "repeat": _repeat,
    "list": _list,
}


def instructions(kind: str, seed: int, held_out: bool) -> Iterator[Instruction]:
    """Different ones, fixed by the seed; every kind has many thousands.

    Args:
        kind: one of `KINDS`.
        seed: of the draw.
        held_out: only those kept for evaluation, or only the others.

    Raises:
        UserError: when it becomes hard to find more.
    """
    draw, told, in_vain = random.Random(f"{kind} {seed}"), set[str](), 0
    while in_vain < PATIENCE:
        made = KINDS[kind](draw)
        in_vain += 1
        if made.held_out == held_out and made.text not in told:
            told.add(made.text)
            in_vain = 0
            yield made
    raise UserError(f"no more than {len(told):,} different instructions of kind {kind}")


def reply(text: str) -> str | None:
    r"""The answer of a reply that follows the template; None for one that does not.

    >>> reply("Answer: 48213\nDone.")
    '48213'
    >>> reply("48213") is None
    True
    """
    found = REPLY.fullmatch(text)
    return found[1] if found else None
