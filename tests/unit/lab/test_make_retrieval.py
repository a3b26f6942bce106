"""Retrieval documents: short, deterministic, and every question can be answered from above."""

import itertools
import json
import random
import re
from pathlib import Path

import pytest
import sentencepiece as spm

from lab.corpus.make_retrieval import NAMES, Writer, documents, main, prose_sentences
from longctx.errors import UserError

LAB = Path(__file__).parents[3] / "assets" / "lab-llama"
MODEL = spm.SentencePieceProcessor(model_file=str(LAB / "tokenizer.model"))
NAME = "|".join(NAMES)
PROSE = ["The whale came up again.", "He looked at the sea, and at the old ship beside it."]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, object]]:
    return documents(MODEL, PROSE, count=400, most=250, seed=1)


def test_all_fit(rows: list[dict[str, object]]) -> None:
    sizes = [len(MODEL.encode(str(row["text"]))) + 2 for row in rows]
    assert max(sizes) <= 250
    assert max(sizes) > 230
    assert len({str(row["text"]) for row in rows}) == len(rows)


def test_answers_stand_above(rows: list[dict[str, object]]) -> None:
    asked = 0
    for row in rows:
        lines = str(row["text"]).split("\n")
        for at, line in enumerate(lines):
            if "? " in line and (answer := re.search(r"(\d{5})\.?$", line)):
                asked += 1
                name = re.search(r"(?:of|has|is) ([A-Z]\w+)\?", line)
                facts = [x for x in lines[:at] if answer[1] in x and "?" not in x]
                assert facts
                assert name is None or all(name[1] in fact for fact in facts)
    assert asked > 0.7 * len(rows)


def test_every_document_asks(rows: list[dict[str, object]]) -> None:
    kinds = {str(row["meta"]["title"]) for row in rows}  # type: ignore[index]
    assert kinds == {"template", "prose", "named", "register"}
    asking = [str(r["text"]) for r in rows if r["meta"]["title"] != "register"]  # type: ignore[index]
    assert all(re.search(r"\? .*\d{5}\.?$", text) for text in asking)


def test_registers_repeat_each_name_with_its_key(rows: list[dict[str, object]]) -> None:
    registers = [str(r["text"]) for r in rows if r["meta"]["title"] == "register"]  # type: ignore[index]
    for text in registers:
        lines = text.split("\n")
        pairs = [(re.findall(NAME, line)[-1], re.findall(r"\d{5}", line)[-1]) for line in lines]
        assert len(set(pairs)) == len({name for name, _ in pairs}) <= 6
        assert len(pairs) > 1.5 * len(set(pairs))


def test_scattered_mentions_are_irregular() -> None:
    made = documents(MODEL, PROSE, 60, 250, 3, {"scattered": 1.0})
    gaps: set[int] = set()
    for row in made:
        text = str(row["text"])
        keys = list(re.finditer(r"\d{5}", text))
        assert len({key[0] for key in keys}) == 1 < len(keys)
        gaps |= {b.start() - a.start() for a, b in itertools.pairwise(keys)}
    assert len(gaps) > 20


def test_unknown_kind_is_named() -> None:
    with pytest.raises(UserError, match="--shares: nope is not one of template"):
        documents(MODEL, PROSE, 1, 250, 3, {"nope": 1.0})


def test_seed_fixes_all() -> None:
    assert documents(MODEL, PROSE, 50, 250, 7) == documents(MODEL, PROSE, 50, 250, 7)
    assert documents(MODEL, PROSE, 50, 250, 7) != documents(MODEL, PROSE, 50, 250, 8)


@pytest.mark.parametrize("most", [160, 200])
def test_shorter_limits_hold(most: int) -> None:
    writer = Writer(MODEL, PROSE, most, random.Random(0))
    for index in range(150):
        for make in (
            writer.template,
            writer.prose_filled,
            writer.named,
            writer.register,
            writer.scattered,
        ):
            assert len(MODEL.encode(make(index))) + 2 <= most


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "raw" / "book").mkdir(parents=True)
    text = "Start here. The whale came up again and again. Nothing else moved in the water. End"
    row = json.dumps({"text": text})
    (tmp_path / "raw" / "book" / "a.jsonl").write_text(row + "\n")
    assert len(prose_sentences(tmp_path / "raw")) == 2
    arguments = ["--text", str(tmp_path / "raw"), "--output", str(tmp_path / "out")]
    arguments += ["--tokenizer", str(LAB), "--count", "20"]
    assert main(arguments) == 0
    file = tmp_path / "out" / "retrieval" / "retrieval.jsonl"
    first = file.read_bytes()
    assert len(first.splitlines()) == 20
    assert main(arguments) == 0
    assert file.read_bytes() == first
    assert main([*arguments, "--max-tokens", "100"]) == 2
    assert "--max-tokens 100 is too small" in capsys.readouterr().err
    with pytest.raises(UserError, match="no sentences"):
        prose_sentences(tmp_path)
