"""Trains the lab tokenizer: SentencePiece BPE, 4,096 pieces, byte fallback, single digits.

Normalisation is the identity and there is no dummy prefix, so `decode(encode(x)) == x` for any
text without U+2581 (SentencePiece's own mark for a space) and NUL. `tokenizer.model` defines the
tokenizer; `tokenizer.json` is its equivalent for `AutoTokenizer`, which puts BOS in front unless
`add_special_tokens=False`. Training is deterministic: the same texts give the same bytes. It takes
one thread, about 20 seconds and 300 MB for the default sample.
"""

import argparse
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece as spm
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from longctx.errors import UserError

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<mask>")  # ids 0 to 4
SAMPLE_CHARACTERS = 8_000_000
MAX_LINE_BYTES = 16_384


def sample_lines(folder: Path, characters: int) -> Iterator[str]:
    """Every k-th line of all texts below `folder`, with k chosen to give about `characters`.

    Raises:
        UserError: if there is no JSONL file below `folder`.
    """
    files = sorted(folder.rglob("*.jsonl"))
    if not files:
        raise UserError(f"{folder} contains no .jsonl file (lab/corpus/fetch.py makes them)")
    total = sum(file.stat().st_size for file in files)
    every = max(1, total // characters)
    number = 0
    for file in files:
        with file.open(encoding="utf-8") as rows:
            for row in rows:
                for line in json.loads(row)["text"].split("\n"):
                    if line and number % every == 0:
                        yield line
                    number += bool(line)


def train(lines: Iterator[str], vocab_size: int) -> bytes:
    """A SentencePiece model file trained on `lines`."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        control_symbols=["<mask>"],
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        character_coverage=0.9995,
        max_sentence_length=MAX_LINE_BYTES,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def to_tokenizers(model: bytes) -> Tokenizer:
    """The same tokenizer for the `tokenizers` library.

    The merges are all splits of a piece into two pieces, ordered by the scores of the pieces: the
    order in which SentencePiece merges them.
    """
    processor = spm.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(i) for i in range(len(processor))]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    joinable = {
        piece: i
        for piece, i in vocab.items()
        if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i))
    }
    merges = [
        (piece[:at], piece[at:])
        for piece, _ in sorted(joinable.items(), key=lambda x: -processor.get_score(x[1]))
        for at in range(1, len(piece))
        if piece[:at] in joinable and piece[at:] in joinable
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token=SPECIAL[0], byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[1]} $A",
        pair=f"{SPECIAL[1]} $A {SPECIAL[1]} $B",
        special_tokens=[(SPECIAL[1], 1)],
    )
    return tokenizer


def save(model: bytes, folder: Path) -> None:
    """Writes `tokenizer.model`, `tokenizer.json` and `tokenizer_config.json`."""
    config: dict[str, Any] = {
        "tokenizer_class": "TokenizersBackend",
        **dict(zip(("unk_token", "bos_token", "eos_token", "pad_token", "mask_token"), SPECIAL,
                   strict=True)),
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    to_tokenizers(model).save(str(folder / "tokenizer.json"))
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--input", type=Path, default=Path("data/lab/raw"), help="folder of JSONL files"
    )
    parser.add_argument("--output", type=Path, default=Path("assets/lab-llama"))
    parser.add_argument(
        "--vocab-size", type=int, default=4096, help="vocabulary size, pieces (default: 4096)"
    )
    parser.add_argument(
        "--sample", type=int, default=SAMPLE_CHARACTERS,
        help="characters to train on (default: %(default)s)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    try:
        model = train(sample_lines(args.input, args.sample), args.vocab_size)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    save(model, args.output)
    print(f"{args.output}: {args.vocab_size} pieces")
    return 0


if __name__ == "__main__":
    sys.exit(main())
