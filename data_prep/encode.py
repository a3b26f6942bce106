r"""Text -> token ids, in batches and in bounded memory.

A long text is encoded in pieces whose ids, joined, are those of the whole text. A piece ends at a
*border*: behind or in front of a line break, or in front of a single space. Why no token is there:

- BPE joins neighbours only. If no token of the whole text crosses a border then no merge ever did,
  and the two sides were merged independently of each other.
- Byte-level BPE merges inside the matches of a splitting regex, scanned from left to right without
  look-behind; so where a match ends, the scan goes on as from a fresh start. In Llama-3's regex
  (and its kin) a match that takes a newline takes the rest of the run of newlines and ends there:
  the cut is behind the last newline. In GPT-2's, no match goes on from a non-space into a space:
  the cut is in front of all the spaces. In both, that holds in front of a single space.
- SentencePiece BPE, in either library: a merge makes a piece of the vocabulary, and no piece holds
  a newline beside another character, nor a space behind one (checked when the file is loaded).
- Tokenizers that turn newlines into spaces (T5, XLM-R) choose tokens word by word.

Later pieces are encoded behind a short context, whose tokens are dropped, so that no mark of a
text's beginning appears inside it. Because tokenizers differ in more than this, every border is
tried first: the characters around it are encoded whole and in two, and where that differs the next
one is taken; a text without a usable border is encoded whole. SentencePiece unigram models are
never cut: they add up float32 scores along the text, so that each choice depends on all before it.

A document is BOS, its ids, EOS. Where a tokenizer has no BOS (Qwen's), EOS stands there too, so
that every document is set off on both sides.

Cost: less than the tokenizer alone takes for long texts, as pieces fit the processor's caches; some
100 MB above the ids, whatever the length.
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
BATCH_CHARACTERS = 1 << 20  # the tokenizers library holds some 100 bytes a token until it returns
WINDOW = 128  # characters on each side of a border that are encoded to try it
TRIES = 64  # borders in a row that may fail before the rest of a text is encoded whole
NEWLINE = re.compile(r"(?<=\S)\s*\n\s*(?=\S)")
SPACE = re.compile(r"(?<=\S) (?=\S)")
CROSSING = re.compile(r"[^\u2581 ][\u2581 ]|[^\n]\n|\n[^\n]")  # U+2581 is a space, too
SAMPLE = "a b\nc"  # has both kinds of border

Ids = NDArray[np.uint16] | NDArray[np.uint32]
Batch = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True)
class Encoder:
    """A tokenizer; `load_encoder` makes it, and makes it again where it is unpickled.

    Attributes:
        path: what it was loaded from.
        vocab_size: number of token ids.
        bos_id: the id that starts a document; `eos_id` where the tokenizer has no BOS.
        eos_id: the id that ends a document.
        sha256: hash of the defining file, see `longctx.data.store.tokenizer_sha256`.
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
        """The smallest type that the token store knows for this vocabulary."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, whole, without special tokens."""
        return self.batch([text])[0]

    def documents(
        self, texts: Sequence[str], piece_characters: int = PIECE_CHARACTERS
    ) -> list[Ids]:
        """BOS, ids and EOS of each text; a text written like a special token is text.

        Args:
            texts: any number of any length.
            piece_characters: texts above this are encoded in pieces of about this length.

        Returns:
            One array a text, uint16 or uint32 by the size of the vocabulary.
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
        """(document, context, piece), some `BATCH_CHARACTERS` at a time."""
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
        """(context, piece) in order; the pieces joined are `text`."""
        start, context, failed = 0, "", 0
        if self.divisible and len(text) > piece_characters:
            at = piece_characters
            while at < len(text) and failed < TRIES:
                end = at + piece_characters  # searched span by span: a line may be the whole text
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
        """Whether the characters around `cut` give the same ids whole and in two."""
        before, after = text[max(0, cut - WINDOW) : cut], text[cut : cut + WINDOW]
        spaces = len(before) - len(before.rstrip()), len(after) - len(after.lstrip())
        if max(spaces) > WINDOW // 2:  # too little of the words beside them would be seen
            return False
        dropped = self._contexts[context]
        both, left, right = self.batch([before + after, before, context + after])
        return right[: len(dropped)] == dropped and both == left + right[len(dropped) :]

    @cached_property
    def _contexts(self) -> dict[str, list[int]]:
        return {context: self.encode(context) for context in ("a\n", "a")}


def _borders(text: str, start: int, end: int) -> Iterator[tuple[int, str]]:
    """(cut, context of what follows) worth trying in a span of `text`, newlines first."""
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
    # The scores of BPE are ranks, those of a unigram model logarithms of probabilities.
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
    from transformers import AutoTokenizer  # five seconds, and only needed here

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
    fast.no_truncation()  # settings of whoever saved the file: they would lose text or add to it
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
