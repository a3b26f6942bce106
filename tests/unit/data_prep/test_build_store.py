"""JSONL to token store: order, malformed lines, both tokenizer files."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece as spm

from longctx.data.store import Store, tokenizer_sha256
from longctx.data_prep.build_store import build, load_encoder, main
from longctx.errors import UserError

LAB = Path(__file__).parents[3] / "assets" / "lab-llama"
MODEL = spm.SentencePieceProcessor(model_file=str(LAB / "tokenizer.model"))


def jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": t, "meta": {}}) + "\n" for t in texts))
    return path


def test_documents_in_order(tmp_path: Path) -> None:
    jsonl(tmp_path / "raw" / "book" / "b.jsonl", ["third\n\n", "fourth"])
    jsonl(tmp_path / "raw" / "arxiv" / "z.jsonl", ["first", "second \u00e9"])
    assert build([tmp_path / "raw"], tmp_path / "s", LAB, 0.01)[2] == 0
    store = Store(tmp_path / "s")
    store.verify()
    store.require_tokenizer(tokenizer_sha256(LAB), "lab")
    read = [store.tokens(i).tolist() for i in range(len(store))]
    wanted = ["first", "second \u00e9", "third\n\n", "fourth"]
    assert read == [[1, *MODEL.encode(text), 2] for text in wanted]
    assert store.meta["source"]["inputs"] == [str(tmp_path / "raw")]


def test_malformed_lines_are_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = jsonl(tmp_path / "a.jsonl", ["good"] * 6)
    bad = [b'{"text": ', b'{"text": "\xff"}', b"[]", b'{"text": ""}', b'{"text": "\\ud800"}']
    file.write_bytes(file.read_bytes() + b"\n".join(bad) + b"\n")
    tokens = 6 * (2 + len(MODEL.encode("good")))
    assert build([file], tmp_path / "s", LAB, 0.5) == (6, tokens, 5)
    named = capsys.readouterr().err
    for number in range(7, 12):
        assert f"{file}:{number}: malformed" in named


def test_too_many_malformed_lines_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = jsonl(tmp_path / "a.jsonl", ["good"] * 98)
    file.write_text(file.read_text() + "{\n{\n")
    arguments = ["--input", str(file), "--output", str(tmp_path / "s"), "--tokenizer", str(LAB)]
    assert main(arguments) == 2
    assert "2 of 100 lines are malformed" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    file.write_text(file.read_text().removesuffix("{\n"))
    assert main([*arguments, "--max-bad-fraction", "0.02"]) == 0


def test_tokenizer_json_gives_the_same_store(tmp_path: Path) -> None:
    folder = tmp_path / "tok"
    shutil.copytree(LAB, folder, ignore=shutil.ignore_patterns("*.model", "*.safetensors"))
    file = jsonl(tmp_path / "a.jsonl", ["one  two\n", "<s> is text", "\u6f22 12345"])
    build([file], tmp_path / "fast", folder, 0.01)
    build([file], tmp_path / "slow", LAB, 0.01)
    fast, slow = Store(tmp_path / "fast"), Store(tmp_path / "slow")
    assert fast.meta["digest"] == slow.meta["digest"]
    assert fast.meta["tokenizer_sha256"] != slow.meta["tokenizer_sha256"]


def test_missing_things(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(UserError, match=r"no \.jsonl file here"):
        build([tmp_path / "nowhere"], tmp_path / "s", LAB, 0.01)
    with pytest.raises(UserError, match=r"no tokenizer\.model"):
        load_encoder(tmp_path)
    build([file], tmp_path / "s", LAB, 0.01)
    with pytest.raises(UserError, match="exists already"):
        build([file], tmp_path / "s", LAB, 0.01)
