"""JSONL in RedPajama's layout -> one token store: BOS, text, EOS per document, in a fixed order.

One process with one document in memory; SentencePiece encodes about 5 MB of text per second and
core. Malformed lines are reported with file and line number. If more than one percent of the lines
are malformed, nothing is written.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from longctx.data.store import StoreWriter
from longctx.data_prep.encode import load_encoder
from longctx.errors import UserError

SHOWN = 10  # malformed lines that are reported one by one


def input_files(inputs: list[Path]) -> list[Path]:
    """Every `.jsonl` file among the inputs or below them, sorted within each input.

    Raises:
        UserError: if an input is missing or contains no such file.
    """
    files: list[Path] = []
    for path in inputs:
        found = [path] if path.is_file() else sorted(path.rglob("*.jsonl"))
        if not found:
            raise UserError(f"{path}: no .jsonl file here")
        files += found
    return files


def parse(line: bytes) -> str:
    """The text of one JSONL line.

    Raises:
        ValueError: if the line is not JSON, not UTF-8, or has no text.
    """
    row = json.loads(line.decode("utf-8"))
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text:
        raise ValueError("no text")
    text.encode("utf-8")  # a lone surrogate fails here
    return text


class Reader:
    """Yields texts and counts malformed lines."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.lines = self.malformed = 0

    def texts(self) -> Iterator[str]:
        """The text of every well-formed line, with a progress bar over bytes."""
        total = sum(file.stat().st_size for file in self.files)
        with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
            for file in self.files:
                with file.open("rb") as lines:
                    for number, line in enumerate(lines, start=1):
                        bar.update(len(line))
                        self.lines += 1
                        try:
                            text = parse(line)
                        except ValueError as error:
                            self._report(f"{file}:{number}: malformed line skipped ({error})")
                            continue
                        yield text

    def _report(self, message: str) -> None:
        self.malformed += 1
        if self.malformed <= SHOWN:
            tqdm.write(message, file=sys.stderr)

    def check(self, fraction: float) -> None:
        """Raises UserError when more than `fraction` of the lines were malformed."""
        if self.malformed > fraction * self.lines:
            raise UserError(
                f"{self.malformed} of {self.lines} lines are malformed, "
                f"more than --max-bad-fraction {fraction}: nothing was written"
            )


def build(
    inputs: list[Path], output: Path, tokenizer: Path, max_bad_fraction: float
) -> tuple[int, int, int]:
    """Writes the store `output`; returns the numbers of documents, tokens and malformed lines.

    Raises:
        UserError: if the input or tokenizer is missing, `output` exists, or too many lines are
            malformed.
    """
    encoder = load_encoder(tokenizer)
    reader = Reader(input_files(inputs))
    writer = StoreWriter(
        output,
        tokenizer_sha256=encoder.sha256,
        vocab_size=encoder.vocab_size,
        bos_id=encoder.bos_id,
        eos_id=encoder.eos_id,
        source={"inputs": [str(path) for path in inputs], "max_bad_fraction": max_bad_fraction},
    )
    with writer:
        for text in reader.texts():
            writer.add(encoder.documents([text])[0])
        reader.check(max_bad_fraction)
    return writer.documents, writer.tokens, reader.malformed


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--input",
        type=Path,
        nargs="+",
        required=True,
        help="JSONL files, or folders with JSONL files at any depth",
    )
    parser.add_argument("--output", type=Path, required=True, help="store directory to create")
    parser.add_argument(
        "--tokenizer", type=Path, default=Path("assets/lab-llama"),
        help="folder with tokenizer.model or tokenizer.json, or a .gguf file "
        "(default: assets/lab-llama)",
    )  # fmt: skip
    parser.add_argument(
        "--max-bad-fraction", type=float, default=0.01,
        help="largest share of malformed lines; with more, nothing is written (default: 0.01)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    try:
        counts = build(args.input, args.output, args.tokenizer, args.max_bad_fraction)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    documents, tokens, malformed = counts
    print(f"{args.output}: {documents} documents, {tokens} tokens, {malformed} malformed lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
