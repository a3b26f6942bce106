"""Makes short key-retrieval documents for the lab model's pretraining mix, as JSONL.

There are five kinds, so that the model learns to look back and copy instead of memorising one
sentence: the passkey prompt of `longctx.data.passkey_text`; the same with sentences of the training
texts as filler; several named keys, each of which is asked for; registers (the same few names and
keys repeated); and one key mentioned at scattered places in prose. The last two are dense in
tokens that can only be copied; without them a small model does not start to copy within a few
million tokens. By default all fit into a 256-token window. The seed determines every byte; 45,000
documents take about 15 seconds.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import sentencepiece as spm

from longctx.data.passkey_text import ANSWER, FILLER, HEAD, KEY_LINE, QUESTION, build
from longctx.errors import UserError

# fmt: off
NAMES = [
    "Emma", "Anne", "Henry", "John", "Mary", "George", "Edward", "Jane", "Harriet", "Frank",
    "Charles", "Louisa", "Robert", "Thomas", "William", "Fanny", "Edmund", "Julia", "Maria",
    "Susan", "Arthur", "Walter", "Alice", "Peter", "Paul", "Martha", "Ruth", "Samuel", "David",
    "Daniel", "Rachel", "Simon", "Andrew", "James", "Philip", "Lucy", "Helen", "Rosalind",
    "Viola", "Hamlet", "Ahab", "Ishmael",
]
# fmt: on
# A statement about a name, and the question whose answer is the key.
FACTS = (
    (
        "The pass key of {name} is {key}.",
        "What is the pass key of {name}? The pass key of {name} is",
    ),
    ("{name} has the pass key {key}.", "Which pass key has {name}? {name} has the pass key"),
    ("Remember that {name} is {key}.", "Who is {name}? Remember that {name} is"),
)  # fmt: skip
# Lines of a register, repeated in changing order.
ENTRIES = ("{name}: {key}", "{name} {key}.", "{name} has {key}.", "The key of {name} is {key}.")
# One key, repeated at irregular distances: only its own digits lead back to it.
MENTIONS = (
    KEY_LINE,
    "The pass key is {key}.",
    "{key} is the pass key.",
    "Remember {key}.",
    "{key}",
)
SHARES = {"template": 0.2, "prose": 0.2, "named": 0.2, "register": 0.4}
SENTENCE = re.compile(r"(?<=[.!?] )[A-Z][a-z][A-Za-z ,;'\n]{15,90}[.!?](?=\s)")
CHARACTERS_PER_TEXT = 60_000


def prose_sentences(folder: Path) -> list[str]:
    """Short sentences without digits from the beginnings of the books and web texts in `folder`.

    Raises:
        UserError: if there are none.
    """
    found: dict[str, None] = {}
    for domain in ("book", "c4"):
        for file in sorted((folder / domain).glob("*.jsonl")):
            with file.open(encoding="utf-8") as rows:
                for row in rows:
                    text = json.loads(row)["text"][:CHARACTERS_PER_TEXT]
                    found.update((" ".join(s.split()), None) for s in SENTENCE.findall(text))
    if not found:
        raise UserError(f"{folder}: no sentences in {folder}/book or {folder}/c4")
    return list(found)


class Writer:
    """Makes documents of at most `most` tokens, including BOS and EOS."""

    def __init__(
        self, model: spm.SentencePieceProcessor, prose: list[str], most: int, rng: random.Random
    ) -> None:
        self.model, self.prose, self.most, self.rng = model, prose, most, rng
        self.encode: Callable[[str], list[int]] = lru_cache(maxsize=1 << 16)(model.encode)

    def _key(self) -> str:
        return str(self.rng.randint(10_000, 99_999))

    def _size(self, text: str) -> int:
        return len(self.encode(text))

    def template(self, index: int) -> str:
        """The passkey prompt and its answer; for every even `index` the question comes twice."""
        again = index % 2 == 0
        room = self._size(".\n" + QUESTION + ANSWER.format(key=10_000)) if again else 0
        # `build` counts BOS; the token left free is for EOS.
        length = self.rng.randint(90, self.most - 1 - room)
        seed = self.rng.getrandbits(48)
        made = build(self.encode, self.model.bos_id(), length, self.rng.random(), seed, index)
        text = str(self.model.decode(made.tokens[1:]))
        return text + (f".\n{QUESTION}{ANSWER.format(key=made.key)}" if again else "")

    def _filler(self, tokens: int, plain: bool) -> str:
        """Sentences of at most `tokens` tokens: the passkey prompt's filler (`plain`) or prose."""
        chosen: list[str] = []
        while True:
            text = FILLER[len(chosen) % len(FILLER)] if plain else self.rng.choice(self.prose)
            tokens -= self._size(" " + text)
            if tokens < 0:
                return " ".join(chosen)
            chosen.append(text)

    def prose_filled(self, index: int) -> str:
        """The passkey prompt with prose as filler."""
        key = self._key()
        lines = [HEAD, "", KEY_LINE.format(key=key), "", QUESTION + ANSWER.format(key=key)]
        if index % 2:
            lines = lines[1:]
        room = self.most - 4 - self._size("\n".join(lines))
        room = self.rng.randint(0, room)
        before = self.rng.randint(0, room)
        at = lines.index(KEY_LINE.format(key=key))
        lines[at - 1] = self._filler(before, plain=False)
        lines[at + 1] = self._filler(room - before, plain=False)
        return "\n".join(line for line in lines if line)

    def named(self, index: int) -> str:
        """One to four named keys, some filler, then one or two questions for every key."""
        fact, question = FACTS[0] if index % 2 else self.rng.choice(FACTS)
        names = self.rng.sample(NAMES, self.rng.randint(1, 4))
        keys = {name: self._key() for name in names}
        facts = [fact.format(name=name, key=keys[name]) for name in names]
        asked = self.rng.sample(names, len(names))
        asked += self.rng.sample(names, self.rng.randint(0, min(2, len(names))))
        quiz = [f"{question.format(name=n)}{ANSWER.format(key=keys[n])}." for n in asked]
        while (room := self.most - 3 - self._size("\n".join(facts + quiz)) - len(names)) < 0:
            quiz.pop()
        room = self.rng.randint(0, room)
        gaps = sorted(self.rng.randint(0, room) for _ in names)
        lines: list[str] = []
        for at, line in enumerate(facts):
            size = gaps[at] - (gaps[at - 1] if at else 0)
            filler = self._filler(max(0, size - 1), plain=self.rng.random() < 0.5)
            # The filler follows the fact, so the key is farther from its question.
            lines += [line, filler]
        return "\n".join(line for line in lines + quiz if line)

    def register(self, index: int) -> str:
        """One to six names with their keys, repeated in changing order up to `most` tokens."""
        entry = ENTRIES[index % len(ENTRIES)]
        keys = {name: self._key() for name in self.rng.sample(NAMES, self.rng.randint(1, 6))}
        lines: list[str] = []
        room = self.most - 2
        while True:
            for name in self.rng.sample(list(keys), len(keys)):
                lines.append(entry.format(name=name, key=keys[name]))
                room -= self._size("\n" + lines[-1])
                if room < 0:
                    return "\n".join(lines[:-1])

    def scattered(self, index: int) -> str:
        """One key, mentioned repeatedly with zero to three sentences of prose or filler between."""
        key = self._key()
        lines: list[str] = []
        room = self.most - 2
        while True:
            between = self.rng.choices(self.prose, k=self.rng.randint(0, 2))
            if (index + len(lines)) % 3 == 0:
                between.append(self.rng.choice(FILLER))
            said = self.rng.choice(MENTIONS).format(key=key)
            lines.append(" ".join([*between, said]))
            room -= self._size("\n" + lines[-1])
            if room < 0:
                return "\n".join(lines[:-1])


def documents(
    model: spm.SentencePieceProcessor,
    prose: list[str],
    count: int,
    most: int,
    seed: int,
    shares: dict[str, float] = SHARES,
) -> list[dict[str, object]]:
    """`count` rows of JSONL with the kinds in the proportions of `shares`.

    Raises:
        UserError: if `most` has no room for the longest template, or a kind does not exist.
    """
    if most < 160:
        raise UserError(f"--max-tokens {most} is too small: documents need up to 160 tokens")
    rng = random.Random(seed)
    writer = Writer(model, prose, most, rng)
    makers = {
        "template": writer.template,
        "prose": writer.prose_filled,
        "named": writer.named,
        "register": writer.register,
        "scattered": writer.scattered,
    }
    if unknown := shares.keys() - makers.keys():
        raise UserError(f"--shares: {', '.join(unknown)} is not one of {', '.join(makers)}")
    rows: list[dict[str, object]] = []
    for index in range(count):
        (kind,) = rng.choices(list(shares), list(shares.values()))
        text = makers[kind](index)
        rows.append({"text": text, "meta": {"source": "retrieval", "title": kind, "index": index}})
    return rows


def _share(text: str) -> tuple[str, float]:
    kind, _, share = text.partition("=")
    return kind, float(share)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--text", type=Path, default=Path("data/lab/raw"), help="folder of the training texts"
    )
    parser.add_argument("--output", type=Path, default=Path("data/lab/raw_retrieval"))
    parser.add_argument("--tokenizer", type=Path, default=Path("assets/lab-llama"))
    parser.add_argument(
        "--count", type=int, default=45_000, help="number of documents (default: 45000)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=250,
        help="longest document including BOS and EOS, tokens (default: 250)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--shares", type=_share, nargs="+", default=list(SHARES.items()), metavar="KIND=SHARE",
        help="proportions of the kinds template, prose, named, register and scattered",
    )  # fmt: skip
    args = parser.parse_args(argv)
    try:
        if not (args.tokenizer / "tokenizer.model").is_file():
            raise UserError(f"{args.tokenizer}: no tokenizer.model here")
        model = spm.SentencePieceProcessor(model_file=str(args.tokenizer / "tokenizer.model"))
        prose = prose_sentences(args.text)
        shares = dict(args.shares)
        rows = documents(model, prose, args.count, args.max_tokens, args.seed, shares)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    path = args.output / "retrieval" / "retrieval.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    part.rename(path)
    print(f"{path}: {len(rows)} documents, from {len(prose)} sentences of prose")
    return 0


if __name__ == "__main__":
    sys.exit(main())
