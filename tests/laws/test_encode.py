"""Law of encoding: in pieces of any size, a text has the ids that it has as a whole.

Held for the lab tokenizer in both its forms and for tokenizers of the families in use, trained
here: byte-level BPE with GPT-2's and Llama-3's regex, SentencePiece BPE as Llama-2 (dummy prefix)
and as T5 (newlines become spaces), unigram of the tokenizers library.
"""

import io
import json
from pathlib import Path

import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from longctx.data_prep import encode
from longctx.data_prep.encode import Encoder, load_encoder

ROOT = Path(__file__).parents[2]
LAB = ROOT / "assets" / "lab-llama"
REAL = "\n".join(
    path.read_text("utf-8") for path in sorted((ROOT / "longctx").rglob("*.py"))[:30]
) + (ROOT / "README.md").read_text("utf-8")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NASTY = [
    *("\n", "\n", "\n\n", "\n\n\n\n", "\r\n", "\r\n\r\n", "\r", "\n    ", "\n\t", " \n"),
    *(" ", " ", "  ", "       ", "\t", "\t\t", "\u00a0", "\u2003", "\u2028", "\u0085", "\x0b"),
    *("\x1c", "\u3000", "a", "b", "the", "whale", "def f(x):", "return", "it's", "'ll", "'", "."),
    *(",", "//", "...", "\u2026", "7", "12345", "\u00e9", "e\u0301", "\u0301", "\u6f22\u5b57"),
    *("\U0001f600", "\u00a8", "\ufb01", "<s>", "</s>", "<unk>", "<0x0A>", "<|endoftext|>"),
    *("\u2581", "\u0120", "\u010a", "\u200d", "\ufeff"),
]
TEXTS = st.lists(st.sampled_from(NASTY), max_size=60).map("".join) | st.text(max_size=80)


def byte_level(pattern: str) -> Tokenizer:
    fast = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([split, whole])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    runs = ["\n" * n for n in range(2, 9)] + [".\n\n  \n", "\n    \n", "\r\n\r\n", " " * 9] * 3
    fast.train_from_iterator([REAL, *runs * 20], trainer)
    return fast


def unigram(*, words: bool) -> Tokenizer:
    """As T5's: whitespace is normalised, `words` splits at it first."""
    fast = Tokenizer(models.Unigram())
    fast.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")]
    )
    marks = pre_tokenizers.Metaspace()
    split = [pre_tokenizers.WhitespaceSplit(), marks] if words else [marks]
    fast.pre_tokenizer = pre_tokenizers.Sequence(split)
    trainer = trainers.UnigramTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>",
        show_progress=False,
    )  # fmt: skip
    fast.train_from_iterator(REAL.split("\n"), trainer)
    return fast


def strip_added(pattern: str) -> Tokenizer:
    """Byte-level, with tokens of its own that swallow the space beside them."""
    fast = byte_level(pattern)
    fast.add_tokens([AddedToken("whale", lstrip=True), AddedToken("def f", rstrip=True), "\n\n"])
    return fast


FAST = {
    "gpt2": lambda: byte_level(GPT2),
    "llama3": lambda: byte_level(LLAMA3),
    "added": lambda: strip_added(LLAMA3),
    "t5": lambda: unigram(words=True),
    "metaspace": lambda: unigram(words=False),
}
SENTENCEPIECE = {
    "llama2": {"byte_fallback": True, "normalization_rule_name": "identity",
               "remove_extra_whitespaces": False, "split_digits": True},
    "t5-bpe": {"normalization_rule_name": "nmt_nfkc"},
    "suffix": {"treat_whitespace_as_suffix": True, "normalization_rule_name": "nmt_nfkc"},
}  # fmt: skip
EXAMPLES = 40
LAB_FORMS = ["lab.model", "lab.json"]
KINDS = [*LAB_FORMS, *FAST, *SENTENCEPIECE]
UNIGRAM = {"t5", "metaspace"}
WHOLE = {"suffix"}  # its pieces end in a space: never cut


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Encoder]:
    root = tmp_path_factory.mktemp("tokenizers")
    made = {}
    for kind in KINDS:
        folder = root / kind
        folder.mkdir()
        config = {"bos_token": "<s>", "eos_token": "</s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        if kind in FAST:
            FAST[kind]().save(str(folder / "tokenizer.json"))
        elif kind in SENTENCEPIECE:
            model = io.BytesIO()
            spm.SentencePieceTrainer.train(
                sentence_iterator=iter(REAL.split("\n")), model_writer=model, model_type="bpe",
                vocab_size=700, minloglevel=2, **SENTENCEPIECE[kind],
            )  # fmt: skip
            (folder / "tokenizer.model").write_bytes(model.getvalue())
        else:
            name = "tokenizer." + kind.removeprefix("lab.")
            (folder / name).write_bytes((LAB / name).read_bytes())
        made[kind] = load_encoder(folder)
    return made


def check(encoder: Encoder, text: str, size: int) -> None:
    (ids,) = encoder.documents([text], piece_characters=size)
    assert ids.tolist() == [encoder.bos_id, *encoder.encode(text), encoder.eos_id]


@pytest.mark.parametrize(
    ("kind", "window"),
    # A unigram model weighs whole words, which the window must hold.
    [
        (kind, window)
        for kind in KINDS
        for window in (encode.WINDOW, 8)[: 1 + (kind not in UNIGRAM)]
    ],
)
def test_pieces_are_the_whole(
    encoders: dict[str, Encoder], kind: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "WINDOW", window)

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(text=TEXTS, size=st.integers(1, 40))
    def law(text: str, size: int) -> None:
        check(encoders[kind], text, size)

    law()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [50, 400])
def test_real_text(encoders: dict[str, Encoder], kind: str, size: int) -> None:
    for end in ("\n", "\r\n", "\n\n", " "):
        text = REAL[: 80 * size].replace("\n", end)
        check(encoders[kind], text, size)
        pieces = [piece for _, piece in encoders[kind]._pieces(text, size)]
        assert "".join(pieces) == text
        if kind in WHOLE:
            assert len(pieces) == 1
        else:
            assert max(map(len, pieces)) < size + 200


def test_the_trial_is_needed(encoders: dict[str, Encoder], monkeypatch: pytest.MonkeyPatch) -> None:
    text = "one\n\ntwo " * 20
    check(encoders["gpt2"], text, 10)
    monkeypatch.setattr(Encoder, "_usable", lambda *_: True)
    with pytest.raises(AssertionError):
        check(encoders["gpt2"], text, 10)
