"""Makes a small instruction set in one fixed template, for a lab chat model, as JSONL.

The instructions are those of `longctx.data.instructions` without the held-out ones and, with --qa,
SQuAD's questions about the sentence that contains the answer. In three of five cases some sentences
of the lab's prose come first, if they fit. About half of SQuAD's articles are kept out of training
and written to a file of their own in SQuAD's layout, for evaluation. The seed determines every
byte; 15,000 documents take seconds.
"""

import argparse
import json
import random
import re
import sys
import zlib
from itertools import chain, cycle
from pathlib import Path
from typing import Any

from lab.corpus.make_retrieval import prose_sentences
from longctx.data.instructions import KINDS, Instruction, instructions
from longctx.data_prep.encode import Encoder, load_encoder
from longctx.errors import UserError

SENTENCE_END = re.compile(r"(?<=[.!?]) +(?=[A-Z\"'(])")


def articles(path: Path) -> list[dict[str, Any]]:
    """The articles of a file in SQuAD's layout.

    Raises:
        UserError: if the file does not have that layout.
    """
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["data"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not JSON in SQuAD's layout (bash data_prep/qa_data.sh fetches such files)"
        ) from error
    return found


def kept_out(article: dict[str, Any]) -> bool:
    """Whether an article is reserved for evaluation."""
    return zlib.crc32(article["title"].encode()) % 2 == 0


def sentence_at(text: str, place: int) -> str:
    """The sentence of `text` that contains the character at `place`."""
    start = 0
    for end in SENTENCE_END.finditer(text):
        if end.start() > place:
            return text[start : end.start()]
        start = end.end()
    return text[start:]


def squad(found: list[dict[str, Any]]) -> list[Instruction]:
    """The answerable questions of the articles that are not reserved for evaluation."""
    made = []
    for article in found:
        if kept_out(article):
            continue
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                if asked["answers"]:
                    first = asked["answers"][0]
                    passage = sentence_at(paragraph["context"], first["answer_start"])
                    question = " ".join(asked["question"].split())
                    answer = " ".join(first["text"].split())
                    made.append(Instruction("squad", " ".join(passage.split()), question, answer))
    return made


class Writer:
    """Makes documents of at most `most` tokens, including BOS and EOS."""

    def __init__(self, encoder: Encoder, prose: list[str], most: int, draw: random.Random) -> None:
        self.encoder, self.prose, self.most, self.draw = encoder, prose, most, draw

    def fits(self, text: str) -> bool:
        """Whether a document of this text is short enough."""
        return len(self.encoder.documents([text])[0]) <= self.most

    def document(self, instruction: Instruction) -> str | None:
        """The instruction's text, three times in five after prose; None if it is too long."""
        text = instruction.text
        if not self.fits(text):
            return None
        for _ in range(self.draw.choice((0, 0, 1, 2, 4))):
            longer = f"{self.draw.choice(self.prose)}\n{text}"
            if not self.fits(longer):
                break
            text = longer
        return text


def documents(
    writer: Writer, questions: list[Instruction], count: int, seed: int
) -> list[dict[str, Any]]:
    """`count` rows of JSONL, shuffled: the questions that fit, then each generated kind in turn.

    Args:
        writer: makes the texts.
        questions: questions to use in addition to the generated kinds, each at most once.
        count: number of documents.
        seed: seed of the generated instructions.
    """
    made = {kind: instructions(kind, seed, held_out=False) for kind in KINDS}
    turns = (next(made[kind]) for kind in cycle(KINDS))
    found: list[tuple[str, str]] = []
    for instruction in chain(questions, turns):
        if len(found) == count:
            break
        text = writer.document(instruction)
        if text is not None:
            found.append((instruction.kind, text))
    writer.draw.shuffle(found)
    return [
        {"text": text, "meta": {"source": "chat", "title": kind, "index": index}}
        for index, (kind, text) in enumerate(found)
    ]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, "utf-8")
    part.rename(path)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--text",
        type=Path,
        default=Path("data/lab/raw"),
        help="folder of the lab's texts, for prose",
    )
    parser.add_argument("--qa", type=Path, help="file of questions in SQuAD's layout")
    parser.add_argument("--output", type=Path, default=Path("data/lab/raw_chat"))
    parser.add_argument("--tokenizer", type=Path, default=Path("assets/lab-llama"))
    parser.add_argument(
        "--count", type=int, default=15_000, help="number of documents (default: 15000)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=250,
        help="longest document including BOS and EOS, tokens (default: 250)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        encoder = load_encoder(args.tokenizer)
        found = articles(args.qa) if args.qa else []
        draw = random.Random(args.seed)
        writer = Writer(encoder, prose_sentences(args.text), args.max_tokens, draw)
        rows = documents(writer, squad(found), args.count, args.seed)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    path = args.output / "chat" / "chat.jsonl"
    _write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    kinds = [row["meta"]["title"] for row in rows]
    counts = ", ".join(f"{kind} {kinds.count(kind)}" for kind in sorted(set(kinds)))
    print(f"{path}: {len(rows)} documents ({counts})")
    if found:
        kept = args.output / "squad_held_out.json"
        out = [article for article in found if kept_out(article)]
        _write(kept, json.dumps({"data": out}, ensure_ascii=False))
        print(f"{kept}: {len(out)} of {len(found)} articles, for evaluation")
    return 0


if __name__ == "__main__":
    sys.exit(main())
