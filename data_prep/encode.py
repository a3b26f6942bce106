r"""Text -> token ids, in batches and in bounded memory.

A long text is encoded in pieces, and the ids of the pieces, joined, equal those of the whole text.
A piece ends at a *border*: after or before a line break, or before a single space. No token crosses
a border, for these reasons:

- BPE merges neighbours only. If no token of the whole text crosses a border, no merge ever did,
  and the two sides were merged independently of each other.
- Byte-level BPE merges inside the matches of a splitting regex, which scans from left to right
  without look-behind, so after the end of a match the scan continues like a fresh start. In
  Llama-3's regex and similar ones, a match that contains a newline extends to the end of the run of
  newlines: the cut is after the last newline. In GPT-2's regex no match continues from a non-space
  into a space: the cut is before all the spaces. Before a single space, both can be cut.
- SentencePiece BPE, in either library: every merge produces a piece of the vocabulary, and no piece
  contains a newline next to another character, or a space after one (checked on loading).
- Tokenizers that turn newlines into spaces (T5, XLM-R) choose tokens word by word.

All pieces but the first are encoded after a short context whose tokens are dropped, so that no
beginning-of-text marker appears inside a text. Because tokenizers differ in more ways than these,
every border is checked first: the characters around it are encoded as a whole and in two parts. If
the ids differ, the next border is tried; a text without a usable border is encoded whole.
SentencePiece unigram models are never cut: they accumulate float32 scores along the text, so that
each choice depends on everything before it.

A document is BOS, its ids, EOS. If a tokenizer has no BOS (Qwen's), EOS takes its place, so that
every document is delimited on both sides.

Cost: for long texts less than the tokenizer alone, because pieces fit into the processor's caches;
about 100 MB of memory beyond the ids, whatever the length.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece as spm
from numpy.typing import NDArray
from tokenizers import Tokenizer

from longctx.data.store import tokenizer_sha256
from longctx.errors import UserError

PIECE_CHARACTERS = 1 << 15  # measured: 16 K to 64 K are fastest
BATCH_CHARACTERS = 1 << 20  # the tokenizers library holds about 100 bytes per token of a batch
WINDOW = 128  # characters on each side of a border that are encoded to check it
TRIES = 64  # after this many failed borders in a row the rest of a text is encoded whole
NEWLINE = re.compile(r"(?<=\S)\s*\n\s*(?=\S)")
SPACE = re.compile(r"(?<=\S) (?=\S)")
CROSSING = re.compile(r"[^\u2581 ][\u2581 ]|[^\n]\n|\n[^\n]")  # U+2581 also stands for a space
SAMPLE = "a b\nc"  # contains both kinds of border

Ids = NDArray[np.uint16] | NDArray[np.uint32]
Batch = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True)
class Encoder:
    """A tokenizer; made by `load_encoder`, and loaded again when it is unpickled.

    Attributes:
        path: folder or file that it was loaded from.
        vocab_size: number of token ids.
        bos_id: the id that starts a document; `eos_id` where the tokenizer has no BOS.
        eos_id: the id that ends a document.
        sha256: hash of the file that defines it, see `longctx.data.store.tokenizer_sha256`.
        batch: ids of each text, without special tokens.
        divisible: whether long texts may be encoded in pieces.
    """

    path: Path
    vocab_size: int
    bos_id: int
    eos_id: int
    sha256: str
    batch: Batch = field(repr=False)
    divisible: bool = True

    def __reduce__(self) -> tuple[Callable[[Path], "Encoder"], tuple[Path]]:
        return load_encoder, (self.path,)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The token store's type for this vocabulary: uint16, or uint32 above 65,536 entries."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, whole, without special tokens."""
        return self.batch([text])[0]

    def documents(
        self, texts: Sequence[str], piece_characters: int = PIECE_CHARACTERS
    ) -> list[Ids]:
        """BOS, ids and EOS of each text; special tokens written in a text are encoded as text.

        Args:
            texts: any number of texts of any length.
            piece_characters: longer texts are encoded in pieces of about this length.

        Returns:
            One array per text, of type `dtype`.
        """
        parts: list[list[Ids]] = [[] for _ in texts]
        for batch in self._batches(texts, piece_characters):
            coded = self.batch([context + piece for _, context, piece in batch])
            for (document, context, _), ids in zip(batch, coded, strict=True):
                own = ids[len(self._contexts[context]) :] if context else ids
                parts[document].append(np.fromiter(own, self.dtype, len(own)))
        bos, eos = np.array([self.bos_id], self.dtype), np.array([self.eos_id], self.dtype)
        return [np.concatenate([bos, *part, eos]) for part in parts]

    def _batches(
        self, texts: Sequence[str], piece_characters: int
    ) -> Iterator[list[tuple[int, str, str]]]:
        """(document, context, piece), about `BATCH_CHARACTERS` at a time."""
        batch: list[tuple[int, str, str]] = []
        characters = 0
        for document, text in enumerate(texts):
            for context, piece in self._pieces(text, piece_characters):
                batch.append((document, context, piece))
                characters += len(piece)
                if characters >= BATCH_CHARACTERS:
                    yield batch
                    batch, characters = [], 0
        if batch:
            yield batch

    def _pieces(self, text: str, piece_characters: int) -> Iterator[tuple[str, str]]:
        """(context, piece) in order; the pieces, joined, are `text`."""
        start, context, failed = 0, "", 0
        if self.divisible and len(text) > piece_characters:
            at = piece_characters
            while at < len(text) and failed < TRIES:
                end = at + piece_characters  # search span by span: one line may be the whole text
                for cut, following in _borders(text, at, end):
                    if self._usable(text, cut, following):
                        yield context, text[start:cut]
                        start, context, end = cut, following, cut + piece_characters
                        failed = 0
                        break
                    failed += 1
                    if failed == TRIES:
                        break
                at = end
        yield context, text[start:]

    def _usable(self, text: str, cut: int, context: str) -> bool:
        """Whether the characters around `cut` give the same ids as a whole and in two parts."""
        before, after = text[max(0, cut - WINDOW) : cut], text[cut : cut + WINDOW]
        spaces = len(before) - len(before.rstrip()), len(after) - len(after.lstrip())
        if max(spaces) > WINDOW // 2:  # too few characters of the words on both sides
            return False
        dropped = self._contexts[context]
        both, left, right = self.batch([before + after, before, context + after])
        return right[: len(dropped)] == dropped and both == left + right[len(dropped) :]

    @cached_property
    def _contexts(self) -> dict[str, list[int]]:
        return {context: self.encode(context) for context in ("a\n", "a")}


def _borders(text: str, start: int, end: int) -> Iterator[tuple[int, str]]:
    """(cut, context for what follows) candidates in a span of `text`, newlines first."""
    for match in NEWLINE.finditer(text, start, end):
        yield match.start() + match[0].rindex("\n") + 1, "a\n"
        yield match.start(), "a"
    for match in SPACE.finditer(text, start, end):
        yield match.start(), "a"


def load_encoder(path: Path) -> Encoder:
    """The tokenizer at `path`.

    Args:
        path: a folder with `tokenizer.model`, else `tokenizer.json` (and `tokenizer_config.json`
            beside it), or a GGUF file.

    Raises:
        UserError: if there is none, or it has no EOS.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return _from_gguf(path)
    if (path / "tokenizer.model").is_file():
        return _from_sentencepiece(path)
    if (path / "tokenizer.json").is_file():
        return _from_tokenizers(path)
    raise UserError(f"{path}: no tokenizer.model and no tokenizer.json here")


def _from_sentencepiece(path: Path) -> Encoder:
    try:
        model = spm.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path / 'tokenizer.model'}: not a SentencePiece model") from error
    if model.eos_id() < 0:
        raise UserError(f"{path}: the tokenizer has no EOS")
    bos = model.bos_id() if model.bos_id() >= 0 else model.eos_id()
    # BPE scores are ranks (integers); those of a unigram model are log probabilities.
    ranked = all(float(model.get_score(i)).is_integer() for i in range(len(model)))
    divisible = ranked and not _cross(model.id_to_piece(i) for i in range(len(model)))

    def batch(texts: list[str]) -> list[list[int]]:
        return model.encode(texts, num_threads=1)  # type: ignore[no-any-return]

    sha256 = tokenizer_sha256(path)
    return Encoder(path, len(model), bos, model.eos_id(), sha256, batch, divisible)


def _from_tokenizers(path: Path) -> Encoder:
    file, config = path / "tokenizer.json", path / "tokenizer_config.json"
    try:
        fast = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{file}: not a tokenizer of the tokenizers library ({error})") from error
    settings: dict[str, Any] = json.loads(config.read_text("utf-8")) if config.is_file() else {}
    ids: dict[str, int] = {}
    for name in ("eos_token", "bos_token") if settings.get("bos_token") else ("eos_token",):
        token = settings.get(name)
        token_id = fast.token_to_id(token["content"] if isinstance(token, dict) else token or "")
        if token_id is None:
            raise UserError(f"{config}: {name} is missing or not in the vocabulary")
        ids[name] = token_id
    eos = ids["eos_token"]
    bos = ids.get("bos_token", eos)
    batch, divisible = _of_tokenizers(fast)
    size = fast.get_vocab_size()
    return Encoder(path, size, bos, eos, tokenizer_sha256(path), batch, divisible)


def _from_gguf(file: Path) -> Encoder:
    if not file.is_file():
        raise UserError(f"{file}: there is no such file")
    from transformers import AutoTokenizer  # takes five seconds and is needed only here

    auto = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    if auto.eos_token_id is None:
        raise UserError(f"{file}: the tokenizer has no EOS")
    batch, divisible = _of_tokenizers(auto.backend_tokenizer)
    sha256 = tokenizer_sha256(file)
    eos = auto.eos_token_id
    ids = eos if auto.bos_token_id is None else auto.bos_token_id, eos
    return Encoder(file, len(auto), *ids, sha256, batch, divisible)


def _of_tokenizers(fast: Tokenizer) -> tuple[Batch, bool]:
    fast.encode_special_tokens = True  # "<s>" written in a text is text
    fast.no_truncation()  # settings stored in the file would cut texts or pad them
    fast.no_padding()

    def batch(texts: list[str]) -> list[list[int]]:
        return [e.ids for e in fast.encode_batch_fast(texts, add_special_tokens=False)]

    return batch, _keeps_borders(fast)


def _keeps_borders(fast: Tokenizer) -> bool:
    """Whether words end at borders, or at least no piece of the vocabulary crosses one."""
    words = [SAMPLE]
    if fast.pre_tokenizer is not None:
        words = [word for word, _ in fast.pre_tokenizer.pre_tokenize_str(SAMPLE)]
    bytewise = any("\u0120" in word for word in words)

    def plain(piece: str) -> str:
        return piece.replace("\u0120", " ").replace("\u010a", "\n") if bytewise else piece

    return not (_cross(map(plain, words)) and _cross(map(plain, fast.get_vocab())))


def _cross(pieces: Iterable[str]) -> bool:
    return any(CROSSING.search(piece) for piece in pieces)
