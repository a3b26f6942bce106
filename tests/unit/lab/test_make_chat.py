"""The chat set: documents in the template that fit, no held-out instruction, SQuAD split."""

import json

import pytest

from lab.corpus.make_chat import kept_out, main, sentence_at
from longctx.data.instructions import KINDS, reply
from longctx.data_prep.encode import load_encoder

ARTICLES = [
    {
        "title": title,
        "paragraphs": [
            {
                "context": f"First a word. {title} lies in the north. It is old.",
                "qas": [
                    {
                        "question": f"Where is  {title}?",
                        "answers": [{"text": "in the north", "answer_start": 20 + len(title)}],
                    },
                    {"question": "Why?", "answers": []},
                ],
            }
        ],
    }
    for title in ("Oslo", "Bergen", "Lund", "Turku", "Riga", "Vilnius")
]


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "raw" / "book"
    folder.mkdir(parents=True)
    text = "It was so. The wind blew over the hills all night. Nobody came to the door then. Ah."
    (folder / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (tmp_path / "squad.json").write_text(json.dumps({"data": ARTICLES}))
    return tmp_path


def make(place, lab_model, *more):
    given = ["--text", place / "raw", "--output", place / "out", "--tokenizer", lab_model]
    code = main([str(x) for x in [*given, "--count", "60", *more]])
    path = place / "out" / "chat" / "chat.jsonl"
    return code, [json.loads(line) for line in path.read_text().splitlines()] if code == 0 else []


def test_documents(place, lab_model, capsys):
    code, rows = make(place, lab_model, "--qa", place / "squad.json")
    assert code == 0 and len(rows) == 60
    encoder = load_encoder(lab_model)
    used = [a["title"] for a in ARTICLES if not kept_out(a)]
    assert 0 < len(used) < len(ARTICLES)
    for row in rows:
        before, _, answer = row["text"].rpartition("\nAnswer: ")
        assert reply(f"Answer: {answer}") and "Question: " in before
        assert len(encoder.documents([row["text"]])[0]) <= 250
    asked = [row["text"] for row in rows if row["meta"]["title"] == "squad"]
    assert len(asked) == len(used)
    for title in used:
        end = (
            f"{title} lies in the north.\nQuestion: Where is {title}?\nAnswer: in the north\nDone."
        )
        assert sum(text.endswith(end) for text in asked) == 1
    assert any(len(row["text"].split("\n")) > 4 for row in rows)  # prose in front
    kinds = [row["meta"]["title"] for row in rows if row["meta"]["title"] != "squad"]
    assert {kind: kinds.count(kind) for kind in KINDS}.keys() == set(kinds)
    held_out = json.loads((place / "out" / "squad_held_out.json").read_text())["data"]
    assert {a["title"] for a in held_out} == {a["title"] for a in ARTICLES} - set(used)


def test_the_seed_fixes_every_byte(place, lab_model):
    first, again, other = (make(place, lab_model, *more)[1] for more in ((), (), ("--seed", "1")))
    assert first == again != other


def test_a_file_of_another_kind_is_one_line(place, lab_model, capsys):
    (place / "squad.json").write_text("[1]")
    assert make(place, lab_model, "--qa", place / "squad.json")[0] == 2
    error = capsys.readouterr().err
    assert "not JSON in SQuAD's layout" in error and error.count("\n") == 1


def test_sentences():
    text = 'He said so. "Then" it rained! Why? No.'
    assert [sentence_at(text, p) for p in (0, 10, 12, 30, 37)] == [
        "He said so.", "He said so.", '"Then" it rained!', "Why?", "No.",
    ]  # fmt: skip
