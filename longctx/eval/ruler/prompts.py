"""RULER's prompts: needles, variables, common and frequent words, questions over documents.

Texts, counts and places are those of NVIDIA's generators, to the letter (double spaces and the
misspelt "assgined" too); only the random numbers are others, drawn for each sample alone. Costs
what its text costs to put together.
Source: RULER (2404.06654) section 3 and its code, package nvidia-long-context-eval 26.3.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import pi
from random import Random
from string import ascii_lowercase, ascii_uppercase
from uuid import UUID

from longctx.eval.ask import Prompt
from longctx.eval.ruler.material import Asked, Exam, sentences

ENDLESS = 10**7  # units of filler: no limit
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NIAH = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I "
    "will quiz you about the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} "
    "for {query} mentioned in the provided text?"
)
NIAH_START = " The special magic {kind} for {query} mentioned in the provided text are"
DEPTHS = [round(100 * i / 39) for i in range(40)]  # per cent of the sentences
VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {query} in the text above."
)
VT_START = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables"
    " are assgined the value {query}, they are: "
)
VT_HOPS = 4
VT_EXAMPLE = 500  # most tokens of the solved example, its answer and room included
CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\nQuestion: What are the 10 most common "
    "words in the above list?"
)
CWE_START = " Answer: The top 10 words that appear most often in the list are:"
CWE_COMMON = 10
FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please "
    "ignore the dots '....'. What are the three most frequently appeared words in the above coded "
    "text?"
)
FWE_START = (
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)
INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words."
)
QA = (
    f"{INSTRUCTION}\n\nThe following are given documents.\n\n{{context}}\n\n{INSTRUCTION}\n\n"
    "Question: {query}"
)
QA_START = " Answer:"
FIRST = 500  # questions of a file that NVIDIA asks
SHORT = 4096  # below it NVIDIA repeats words less often


def _letters(draw: Random, alphabet: str, count: int) -> str:
    return "".join(draw.choices(alphabet, k=count))


@dataclass(frozen=True)
class Niah:
    """Needles in noise, in essays, or among other needles; a unit is a line or a word.

    Args:
        haystack: `repeat | essay | needle`.
        keys: `words | uuids`.
        values: `numbers | uuids`.
        needles: keys in the text.
        per_key: values of each.
        asked: keys asked for.
        nouns, adjectives: a key is one of each.
        essay: words, for that haystack.
    """

    haystack: str
    keys: str
    values: str
    needles: int
    per_key: int
    asked: int
    nouns: Sequence[str]
    adjectives: Sequence[str]
    essay: Sequence[str]

    @property
    def least(self) -> int:
        """Needles go between lines, each in its own place."""
        return 1 if self.haystack == "essay" else self.needles * self.per_key

    @property
    def most(self) -> int:
        """All words of the essays."""
        return len(self.essay) if self.haystack == "essay" else ENDLESS

    def _random(self, kind: str, draw: Random) -> str:
        if kind == "numbers":
            return str(draw.randint(10**6, 10**7 - 1))
        if kind == "uuids":
            return str(UUID(int=draw.getrandbits(128), version=4))
        return f"{draw.choice(self.adjectives)}-{draw.choice(self.nouns)}"

    def _needle(self, draw: Random, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.values, key=key, value=value)

    def _context(self, size: int, needles: Sequence[str], draw: Random) -> str:
        if self.haystack == "essay":
            parts = sentences(" ".join(self.essay[:size]))
            depths = draw.sample(DEPTHS, len(needles))
            places = sorted(int(len(parts) * depth / 100) for depth in depths)
            out, last = list[str](), 0
            for place, needle in zip(places, needles, strict=True):
                out += [" ".join(parts[last:place]), needle]
                last = place
            return " ".join([*out, " ".join(parts[last:])])
        if self.haystack == "needle":
            kinds = (self.keys, self.values)
            pairs = [[self._random(kind, draw) for kind in kinds] for _ in range(size)]
            lines = [self._needle(draw, key, value) for key, value in pairs]
        else:
            lines = [NOISE] * size
        places = sorted(draw.sample(range(size), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)

    def write(self, size: int, index: int, draw: Random) -> Prompt:
        """A prompt with `size` lines, or words of essays."""
        keys = [self._random(self.keys, draw) for _ in range(self.needles)]
        values = [[self._random(self.values, draw) for _ in range(self.per_key)] for _ in keys]
        asked = draw.sample(range(self.needles), self.asked)
        needles = [
            self._needle(draw, key, v) for key, vs in zip(keys, values, strict=True) for v in vs
        ]
        draw.shuffle(needles)
        context = self._context(size, needles, draw)
        names = [keys[i] for i in asked]
        query = ", ".join(names[:-1]) + f", and {names[-1]}" if len(names) > 1 else names[0]
        answers = tuple(value for i in asked for value in values[i])
        text, start, kind = NIAH, NIAH_START, self.values
        if len(answers) == 1:
            text = text.replace("Some", "A").replace("are all", "is").replace("are", "is")
            start, kind = start.replace("are", "is"), kind[:-1]
        return Prompt(
            text.format(kind=kind, context=context, query=query),
            start.format(kind=kind, query=query),
            answers,
            tuple(self._needle(draw, keys[i], value) for i in asked for value in values[i]),
        )


@dataclass(frozen=True)
class Variables:
    """A chain of variables in noise, behind a solved example; a unit is a line of noise.

    Args:
        example_noise: lines of noise in the example.
    """

    example_noise: int

    @property
    def least(self) -> int:
        """More lines than the chain has, so that none is broken up."""
        return VT_HOPS + 2

    @property
    def most(self) -> int:
        """No limit."""
        return ENDLESS

    def write(self, size: int, index: int, draw: Random) -> Prompt:
        """A prompt with `size` lines of noise."""
        shown = self._chain(self.example_noise, 3, draw)
        prompt = self._chain(size, 5, draw)
        # As NVIDIA joins them, spaces and all.
        before = f" {shown.text}{shown.start} {' '.join(shown.answers)}\n\n\n\n"
        return Prompt(before + prompt.text, prompt.start, prompt.answers, prompt.evidence)

    @staticmethod
    def _chain(noise: int, letters: int, draw: Random) -> Prompt:
        names: list[str] = []
        while len(names) <= VT_HOPS:
            name = _letters(draw, ascii_uppercase, letters)
            names += [] if name in names else [name]
        value = str(draw.randrange(10_000, 99_999))
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {b} = VAR {a} " for a, b in pairwise(names)]
        lines = [f"{NOISE}\n"] * noise
        if len(lines) <= len(chain):
            parts = [part for line in lines for part in line.split(".")]
            lines = [part + "." if part.strip() else part for part in parts]
        places = sorted(draw.sample(range(len(lines)), len(chain)))
        for j, place in enumerate(places):
            lines.insert(place + j, chain[j])
        context = " ".join(lines).replace(". \n", ".\n")
        start = VT_START.format(count=len(names), query=value)
        text = VT.format(context=context, query=value)
        return Prompt(text, start, tuple(names), tuple(line.strip() for line in chain))


def variables(count: Callable[[str], int], room: int) -> Variables:
    """Variable tracking with as long an example as NVIDIA's.

    Args:
        count: tokens of a text.
        room: tokens kept for an answer.
    """
    noise = 5
    while True:
        shown = Variables._chain(noise + 5, 3, Random(0))
        text = f"{shown.text}{shown.start} {' '.join(shown.answers)}"
        if count(text) + room > VT_EXAMPLE:
            return Variables(noise)
        noise += 5


@dataclass(frozen=True)
class CommonWords:
    """A numbered list in which ten words come more often, behind a solved one; a unit is a word.

    Args:
        words: to draw from.
        short: fewer repetitions, for lengths below 4,096.
    """

    words: Sequence[str]
    short: bool

    @property
    def least(self) -> int:
        """The ten common words and one more."""
        return CWE_COMMON + 1

    @property
    def most(self) -> int:
        """Every word."""
        return len(self.words)

    def _list(self, size: int, often: int, rare: int, draw: Random) -> tuple[str, list[str]]:
        drawn = draw.sample(self.words, size)
        common = drawn[:CWE_COMMON]
        listed = common * often + drawn[CWE_COMMON:] * rare
        draw.shuffle(listed)
        return _numbered(listed), common

    def write(self, size: int, index: int, draw: Random) -> Prompt:
        """A prompt with `size` different words."""
        shown, known = self._list(*((20, 3, 1) if self.short else (40, 10, 3)), draw)
        context, common = self._list(size, *((6, 1) if self.short else (30, 3)), draw)
        before = CWE.format(context=shown) + CWE_START + _numbered(known)
        return Prompt(f"{before}\n{CWE.format(context=context)}", CWE_START, tuple(common))


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


@dataclass(frozen=True)
class FrequentWords:
    """Coded words whose counts fall as 1 / rank^2, the first of them dots; a unit is a word.

    Args:
        vocabulary: different words.
    """

    vocabulary: int

    @property
    def least(self) -> int:
        """The fewest at which the third answer comes more often than the next word."""
        return next(n for n in range(1, ENDLESS) if self.count(n, 4) > self.count(n, 5))

    @property
    def most(self) -> int:
        """No limit."""
        return ENDLESS

    @staticmethod
    def count(size: int, rank: int) -> int:
        """How often the word of that rank comes: size / (rank^2 zeta(2)), rounded down."""
        return int(size * rank**-2.0 / (pi**2 / 6))

    def write(self, size: int, index: int, draw: Random) -> Prompt:
        """A prompt with about `size` words."""
        words: dict[str, None] = {}
        while len(words) < self.vocabulary:
            words[_letters(draw, ascii_lowercase, 6)] = None
        ranked = ["...", *list(words)[1:]]
        text = [w for rank, w in enumerate(ranked, 1) for _ in range(self.count(size, rank))]
        draw.shuffle(text)
        return Prompt(FWE.format(context=" ".join(text)), FWE_START, tuple(ranked[1:4]))


@dataclass(frozen=True)
class Documents:
    """Questions of one file; a unit is a document.

    Args:
        exam: questions and documents.
        seed: fixes which of the questions are asked first; NVIDIA's 500 come before all others.
    """

    exam: Exam
    seed: int

    @property
    def least(self) -> int:
        """The documents that answer; two for HotpotQA."""
        return max((asked.gold for asked in self.exam.questions[:FIRST]), default=1)

    @property
    def most(self) -> int:
        """All documents."""
        return len(self.exam.documents)

    def question(self, index: int) -> Asked:
        """Question number `index` of a shuffled order."""
        order = list(range(min(FIRST, len(self.exam.questions))))
        Random(f"ruler questions {self.seed}").shuffle(order)
        place = order[index] if index < len(order) else index
        return self.exam.questions[place % len(self.exam.questions)]

    def _documents(self, asked: Asked, size: int, draw: Random) -> list[int]:
        if size <= len(asked.own):  # below NVIDIA's ten: those that answer come first
            return list(asked.own[:size])
        if size >= self.most:
            return list(range(self.most))
        more = size - len(asked.own)
        if more <= len(asked.near):
            return [*asked.own, *draw.sample(asked.near, more)]
        known = {*asked.own, *asked.near}
        others = [i for i in range(self.most) if i not in known]
        more -= len(asked.near)
        return [*asked.own, *asked.near, *draw.sample(others, min(more, len(others)))]

    def write(self, size: int, index: int, draw: Random) -> Prompt:
        """A prompt with `size` documents."""
        asked = self.question(index)
        places = self._documents(asked, size, draw)
        draw.shuffle(places)
        texts = [self.exam.documents[i] for i in places]
        context = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(texts, 1))
        gold = tuple(self.exam.documents[i] for i in asked.own[: asked.gold])
        text = QA.format(context=context, query=asked.text)
        return Prompt(text, QA_START, asked.answers, gold, {"documents": len(texts)})
