"""The passkey prompt, in tokens: a five-digit key hidden in filler, and the question for it.

Text after Mohtashami & Jaggi (2305.16300); lengths, depths and distances are counted in tokens
and the filler is cut between sentences only. Lines are joined by newlines, and the prompt ends
without a space: the answer is `" 48213"`, so that its leading space belongs to the answer's
tokens, as it does when the whole text is tokenised at once. Cost: about 20 short encodings.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, chain

from longctx.errors import UserError

HEAD = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
    "them. I will quiz you about the important information there."
)
FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
KEY_LINE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
ANSWER = " {key}"

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Passkey:
    """One prompt with its answer.

    Args:
        tokens: the prompt and, at its end, the answer.
        answer: first and one past the last position of the answer in `tokens`.
        key: the five digits.
        distance: tokens from the first token of the key line to the end of the prompt (without
            the answer): a model that sees exactly that many tokens back sees the whole key line.
    """

    tokens: list[int]
    answer: tuple[int, int]
    key: str
    distance: int


def draw_key(*identity: object) -> str:
    """Five digits, 10000 to 99999, fixed by `identity` on every machine."""
    digest = hashlib.sha256(repr(identity).encode()).digest()
    return str(10_000 + int.from_bytes(digest[:8], "big") % 90_000)


def _after(encode: Encode, context: str, text: str) -> list[int]:
    """Tokens of `text` where it follows `context`; a tokenizer's dummy prefix stays outside."""
    return encode(context + text)[len(encode(context)) :]


class _Template:
    """The fixed pieces and the filler of one prompt, encoded."""

    def __init__(self, encode: Encode, bos_id: int | None, key: str) -> None:
        self.newline = _after(encode, "a", "\n")
        self.first = self.newline + _after(encode, "\n", FILLER[0])
        turned = [*FILLER[1:], FILLER[0]]  # what follows the line's first sentence, in turn
        self.rest = [_after(encode, ".", " " + sentence) for sentence in turned]
        self.head = ([] if bos_id is None else [bos_id]) + encode(HEAD)
        self.key_line = self.newline + _after(encode, "\n", KEY_LINE.format(key=key))
        self.question = self.newline + _after(encode, "\n", QUESTION)
        self.answer = _after(encode, "is", ANSWER.format(key=key))
        self.fixed = sum(map(len, (self.head, self.key_line, self.question, self.answer)))

    def filler(self, sentences: int) -> list[int]:
        """A line of the first `sentences` filler sentences; nothing for none."""
        if not sentences:
            return []
        whole, part = divmod(sentences - 1, len(self.rest))
        cycle, turn = chain(*self.rest), chain(*self.rest[:part])
        return self.first + list(cycle) * whole + list(turn)

    def fitting(self, budget: int) -> int:
        """The most sentences whose line has at most `budget` tokens."""
        left = budget - len(self.first)
        if left < 0:
            return 0
        whole, left = divmod(left, sum(map(len, self.rest)))
        ends = accumulate(map(len, self.rest))
        return 1 + whole * len(self.rest) + sum(end <= left for end in ends)

    def nearest(self, target: int, budget: int) -> int:
        """Sentences whose line has as nearly `target` tokens as `budget` tokens allow."""
        count = self.fitting(min(target, budget))
        more = len(self.filler(count + 1))
        closer = more - target < target - len(self.filler(count))
        return count + 1 if closer and more <= budget else count

    def assemble(self, before: int, after: int, key: str) -> Passkey:
        """The prompt with the given numbers of filler sentences before and after the key line."""
        tokens = self.head + self.filler(before)
        key_at = len(tokens)
        tokens += self.key_line + self.filler(after) + self.question
        end = len(tokens)
        tokens += self.answer
        distance = end - key_at - len(self.newline)
        return Passkey(tokens, (end, len(tokens)), key, distance)


def _template(encode: Encode, bos_id: int | None, length: int, key: str) -> _Template:
    template = _Template(encode, bos_id, key)
    if length < template.fixed:
        raise UserError(f"passkey length {length} is too short: the template has {template.fixed}")
    return template


def build(
    encode: Encode, bos_id: int | None, length: int, depth: float, seed: int, index: int
) -> Passkey:
    """A prompt of nearly `length` tokens with the key at relative `depth`.

    Args:
        encode: text -> ids, without special tokens.
        bos_id: put in front; None: nothing.
        length: most tokens, the answer and BOS included.
        depth: share of the filler that stands before the key, 0 to 1.
        seed: with `length`, `depth` and `index`, fixes the key.
        index: number of the sample.

    Raises:
        UserError: if `length` is too short for the template, or `depth` is outside 0..1.
    """
    if not 0 <= depth <= 1:
        raise UserError(f"passkey depth {depth} is not between 0 and 1")
    key = draw_key("depth", seed, length, float(depth), index)
    template = _template(encode, bos_id, length, key)
    budget = length - template.fixed
    before = template.nearest(round(depth * budget), budget)
    after = template.fitting(budget - len(template.filler(before)))
    return template.assemble(before, after, key)


def build_at_distance(
    encode: Encode, bos_id: int | None, length: int, distance: int, seed: int, index: int
) -> Passkey:
    """A prompt of nearly `length` tokens with the key line `distance` tokens before its end.

    The result says which distance was reached: filler sentences are not cut, and the key line
    cannot stand nearer than the question nor farther than the head.

    Args:
        encode: text -> ids, without special tokens.
        bos_id: put in front; None: nothing.
        length: most tokens, the answer and BOS included.
        distance: wanted `Passkey.distance`, tokens.
        seed: with `length`, `distance` and `index`, fixes the key.
        index: number of the sample.

    Raises:
        UserError: if `length` is too short for the template.
    """
    key = draw_key("distance", seed, length, distance, index)
    template = _template(encode, bos_id, length, key)
    budget = length - template.fixed
    least = len(template.key_line) - len(template.newline) + len(template.question)
    after = template.nearest(max(0, distance - least), budget)
    before = template.fitting(budget - len(template.filler(after)))
    return template.assemble(before, after, key)
