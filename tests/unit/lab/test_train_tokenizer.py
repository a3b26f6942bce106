"""The lab tokenizer: exact round trip, and one answer from three libraries."""

import json
import string
from pathlib import Path

import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lab.corpus.train_tokenizer import sample_lines, save, to_tokenizers, train
from longctx.errors import UserError

LAB = Path(__file__).parents[3] / "assets" / "lab-llama"
MODEL = spm.SentencePieceProcessor(model_file=str(LAB / "tokenizer.model"))
FAST = Tokenizer.from_file(str(LAB / "tokenizer.json"))
FAST.encode_special_tokens = True

TEXTS = [
    "a\tb\n\n c  d   e\r\n",
    "    def f(x):\n        return x  # 12345 \u00e9 \u6f22\u5b57 \U0001f600\n",
    "\n\n\n  leading and trailing  \n",
    "<s> </s> <unk> <pad> <mask> <0x0A>",
    "1234567890 3.14159 10,000",
    "",
]
unusual = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581\0"))
usual = st.text(string.ascii_letters + string.digits + " \n\t.,'-()=", max_size=300)


def check(text: str) -> None:
    ids = MODEL.encode(text)
    assert MODEL.decode(ids) == text
    assert FAST.encode(text, add_special_tokens=False).ids == ids
    assert FAST.encode(text).ids == [1, *ids]
    assert FAST.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(text: str) -> None:
    check(text)


@settings(max_examples=200, deadline=None)
@given(st.one_of(unusual, usual))
def test_any_text_round_trips(text: str) -> None:
    check(text)


def test_pieces() -> None:
    assert len(MODEL) == FAST.get_vocab_size() == 4096
    names = ["<unk>", "<s>", "</s>", "<pad>", "<mask>"]
    assert [MODEL.id_to_piece(i) for i in range(5)] == names
    assert [FAST.id_to_token(i) for i in range(5)] == names
    assert MODEL.encode(" 48213", out_type=str) == ["\u2581", "4", "8", "2", "1", "3"]
    assert not [
        piece
        for i in range(len(MODEL))
        if not MODEL.is_byte(i)
        and len(piece := MODEL.id_to_piece(i)) > 1
        and any(c.isdigit() for c in piece)
    ]


def test_shipped_files_say_the_same() -> None:
    made = to_tokenizers((LAB / "tokenizer.model").read_bytes())
    assert json.loads(made.to_str()) == json.loads((LAB / "tokenizer.json").read_text("utf-8"))


def test_special_tokens_in_a_text_are_text() -> None:
    assert not {1, 2, 3, 4} & set(MODEL.encode("<s> </s> <pad> <mask>"))


def corpus(folder: Path) -> Path:
    words = ["the", "key", "whale", "sentence", "number 42", "ship", "  indented", "caf\u00e9"]
    rows = []
    for i in range(60):
        line = " ".join(words[(i * k) % len(words)] for k in range(1, 9))
        rows.append(json.dumps({"text": f"{line}\n\n{line.title()}."}))
    folder.mkdir(parents=True)
    (folder / "a.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def test_training_is_deterministic_and_saves_what_loads(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "raw")
    first, second = (train(sample_lines(folder, 10_000), 340) for _ in range(2))
    assert first == second
    save(first, tmp_path / "tok")
    names = sorted(file.name for file in (tmp_path / "tok").iterdir())
    assert names == ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    model = spm.SentencePieceProcessor(model_proto=first)
    text = "the whale\n  key 42"
    assert to_tokenizers(first).encode(text, add_special_tokens=False).ids == model.encode(text)


def test_sample_is_bounded(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "raw")
    everything = list(sample_lines(folder, 10**9))
    some = list(sample_lines(folder, 1_000))
    assert len(everything) == 120
    assert 0 < len(some) < 40
    with pytest.raises(UserError, match=r"no \.jsonl"):
        list(sample_lines(tmp_path / "nowhere", 10))


def test_auto_tokenizer_agrees() -> None:
    transformers = pytest.importorskip("transformers")
    auto = transformers.AutoTokenizer.from_pretrained(LAB)
    for text in TEXTS:
        ids = MODEL.encode(text)
        assert auto(text)["input_ids"] == [1, *ids]
        assert auto(text, add_special_tokens=False)["input_ids"] == ids
        assert auto.decode(ids) == text
    named = (auto.bos_token_id, auto.eos_token_id, auto.pad_token_id, auto.mask_token_id)
    assert named == (1, 2, 3, 4)
