"""Tokenizer files of three kinds, BOS and EOS, long texts in pieces, what damaged files say."""

import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
from tokenizers import Tokenizer

from longctx.data.store import tokenizer_sha256
from longctx.data_prep import encode
from longctx.data_prep.encode import Encoder, load_encoder
from longctx.errors import UserError

LAB = Path(__file__).parents[3] / "assets" / "lab-llama"
MODEL = spm.SentencePieceProcessor(model_file=str(LAB / "tokenizer.model"))
LONG = "\n".join(f"Line {i}: the ship, the whale,\tand   {i * 7} men." for i in range(400))


@pytest.fixture
def fast_folder(tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(LAB / name, tmp_path / name)
    return tmp_path


def spied(encoder: Encoder) -> tuple[Encoder, list[str]]:
    """The encoder, and a list that gathers every text that it is given."""
    seen: list[str] = []

    def batch(texts: list[str]) -> list[list[int]]:
        seen.extend(texts)
        return encoder.batch(texts)

    fields = (encoder.path, encoder.vocab_size, encoder.bos_id, encoder.eos_id, encoder.sha256)
    return Encoder(*fields, batch, encoder.divisible), seen


@pytest.mark.parametrize("kind", ["model", "json"])
def test_documents_have_bos_and_eos(kind: str, fast_folder: Path) -> None:
    encoder = load_encoder(LAB if kind == "model" else fast_folder)
    texts = ["", "a whale", "<s> </s> is text", LONG]
    made = encoder.documents(texts)
    assert [ids.tolist() for ids in made] == [[1, *MODEL.encode(text), 2] for text in texts]
    assert {ids.dtype for ids in made} == {np.dtype(np.uint16)}
    assert (encoder.vocab_size, encoder.bos_id, encoder.eos_id) == (4096, 1, 2)
    assert encoder.sha256 == tokenizer_sha256(encoder.path)
    assert encoder.encode("a whale") == MODEL.encode("a whale")
    assert encoder.documents([]) == []


def test_long_texts_go_in_pieces() -> None:
    encoder, seen = spied(load_encoder(LAB))
    (ids,) = encoder.documents([LONG], piece_characters=500)
    assert ids[1:-1].tolist() == MODEL.encode(LONG)
    assert max(map(len, seen)) < 700
    assert sum(len(text) > 400 for text in seen) > len(LONG) / 700


def test_one_endless_line_goes_in_pieces_too() -> None:
    encoder, seen = spied(load_encoder(LAB))
    text = LONG.replace("\n", " ")
    (ids,) = encoder.documents([text], piece_characters=500)
    assert ids[1:-1].tolist() == MODEL.encode(text)
    assert max(map(len, seen)) < 700


def test_without_a_border_the_text_is_encoded_whole() -> None:
    encoder, seen = spied(load_encoder(LAB))
    text = "x1" * 1000
    (ids,) = encoder.documents([text], piece_characters=100)
    assert ids[1:-1].tolist() == MODEL.encode(text)
    assert seen == [text]


def test_a_border_that_fails_its_trial_is_not_taken() -> None:
    encoder = load_encoder(LAB)
    newline = encoder.encode("\n")[0]
    tried = []

    def batch(texts: list[str]) -> list[list[int]]:  # a last newline disappears
        tried.extend(texts)
        return [ids[:-1] if ids[-1:] == [newline] else ids for ids in encoder.batch(texts)]

    fields = (encoder.path, encoder.vocab_size, encoder.bos_id, encoder.eos_id, encoder.sha256)
    odd = Encoder(*fields, batch)
    (ids,) = odd.documents([LONG], piece_characters=500)
    assert ids[1:-1].tolist() == MODEL.encode(LONG)
    assert max(map(len, tried)) < 700  # cut in front of newlines instead


def test_trials_end(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, seen = spied(load_encoder(LAB))
    monkeypatch.setattr(Encoder, "_usable", lambda *_: False)
    (ids,) = encoder.documents([LONG], piece_characters=500)
    assert ids[1:-1].tolist() == MODEL.encode(LONG)
    assert seen == [LONG]


def test_a_border_beside_many_spaces_is_not_trusted() -> None:
    encoder = load_encoder(LAB)
    for spaces, trusted in ((20, True), (100, False)):
        for text in (f"word word\n{' ' * spaces}word word", f"word word{' ' * spaces}\nword word"):
            assert encoder._usable(text, text.index("\n") + 1, "a\n") == trusted


def test_batches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_encoder(LAB)
    sizes = []

    def batch(texts: list[str]) -> list[list[int]]:
        sizes.append(sum(map(len, texts)))
        return encoder.batch(texts)

    fields = (encoder.path, encoder.vocab_size, encoder.bos_id, encoder.eos_id, encoder.sha256)
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 3000)
    Encoder(*fields, batch).documents([LONG] * 5 + ["short"] * 100, piece_characters=500)
    assert max(sizes) < 3000 + 700
    assert len(sizes) > 5 * len(LONG) / 3700


def test_pickled_by_its_path(fast_folder: Path) -> None:
    for path in (LAB, fast_folder):
        encoder = load_encoder(path)
        data = pickle.dumps(encoder)
        assert len(data) < 500
        again = pickle.loads(data)
        assert again.documents(["a whale"])[0].tolist() == [1, *MODEL.encode("a whale"), 2]
        assert again.sha256 == encoder.sha256


def test_saved_truncation_and_padding_are_ignored(fast_folder: Path) -> None:
    fast = Tokenizer.from_file(str(fast_folder / "tokenizer.json"))
    fast.enable_truncation(4)
    fast.enable_padding(pad_id=3, pad_token="<pad>", length=8)
    fast.save(str(fast_folder / "tokenizer.json"))
    texts = ["a", "a long text about whales"]
    made = load_encoder(fast_folder).documents(texts)
    assert [ids.tolist() for ids in made] == [[1, *MODEL.encode(text), 2] for text in texts]


def test_large_vocabularies_take_four_bytes(fast_folder: Path) -> None:
    fast = Tokenizer.from_file(str(fast_folder / "tokenizer.json"))
    fast.add_tokens([f"zzq{i}" for i in range(1 << 16)])
    fast.save(str(fast_folder / "tokenizer.json"))
    encoder = load_encoder(fast_folder)
    assert encoder.vocab_size == 4096 + (1 << 16)
    (ids,) = encoder.documents([f"zzq{(1 << 16) - 1}"])
    assert ids.tolist() == [1, encoder.vocab_size - 1, 2]
    assert ids.dtype == np.uint32


def trained(folder: Path, **settings: object) -> Encoder:
    """A SentencePiece model trained on `LONG`."""
    made = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(LONG.split("\n")), model_writer=made, minloglevel=2, **settings
    )
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(made.getvalue())
    return load_encoder(folder)


def test_which_sentencepiece_models_are_cut(tmp_path: Path) -> None:
    words = {"vocab_size": 90, "hard_vocab_limit": False}
    assert trained(tmp_path, model_type="bpe", **words).divisible
    assert not trained(tmp_path, model_type="unigram", **words).divisible
    # pieces over spaces, such as "the whale"
    assert not trained(tmp_path, model_type="bpe", split_by_whitespace=False, **words).divisible


def test_without_bos_eos_is_on_both_sides(
    tmp_path: Path, fast_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for nothing in ({}, {"bos_token": None}):
        config = {"eos_token": {"content": "</s>"}} | nothing
        (fast_folder / "tokenizer_config.json").write_text(json.dumps(config))
        encoder = load_encoder(fast_folder)
        assert (encoder.bos_id, encoder.eos_id) == (2, 2)
        assert encoder.documents(["a whale"])[0].tolist() == [2, *MODEL.encode("a whale"), 2]
    (fast_folder / "tokenizer_config.json").write_text('{"bos_token": "<?>", "eos_token": "</s>"}')
    with pytest.raises(UserError, match="bos_token is missing or not in the vocabulary"):
        load_encoder(fast_folder)
    words = {"vocab_size": 90, "hard_vocab_limit": False, "model_type": "bpe"}
    pieces = trained(tmp_path / "sp", bos_id=-1, eos_id=1, **words)
    assert (pieces.bos_id, pieces.eos_id) == (1, 1)
    with pytest.raises(UserError, match="the tokenizer has no EOS"):
        trained(tmp_path / "sp", eos_id=-1, **words)


def test_damaged_and_missing_files(tmp_path: Path, fast_folder: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.model and no tokenizer\.json"):
        load_encoder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no such file"):
        load_encoder(tmp_path / "model.gguf")
    (fast_folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    with pytest.raises(UserError, match="eos_token is missing"):
        load_encoder(fast_folder)
    (fast_folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer"):
        load_encoder(fast_folder)
    (fast_folder / "tokenizer.model").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"tokenizer\.model: not a SentencePiece model"):
        load_encoder(fast_folder)


def test_gguf_through_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    auto = transformers.AutoTokenizer.from_pretrained(LAB)
    made = lambda folder, gguf_file: auto  # noqa: E731
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", made)
    (tmp_path / "model.gguf").write_bytes(b"weights")
    encoder = load_encoder(tmp_path / "model.gguf")
    text = "<s> a whale\nand a ship"
    assert encoder.documents([text])[0].tolist() == [1, *MODEL.encode(text), 2]
    assert encoder.sha256 == tokenizer_sha256(tmp_path / "model.gguf")
