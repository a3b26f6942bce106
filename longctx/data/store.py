"""The token store: what `data_prep` writes and the loader reads.

A directory with `tokens.ds` (flat little-endian uint16, uint32 above 65,536 entries) and
`tokens.ds.index` (uint64 end of each document, tokens), both in datatrove's format, beside
`tokens.ds.crc` (uint32 CRC32 of each document's bytes) and `meta.json`. Opening reads the index
and the CRCs (12 bytes per document) and maps the tokens; writing holds one buffer in memory.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from longctx.errors import UserError

FORMAT = 1
TOKENS, INDEX, CRC, META = "tokens.ds", "tokens.ds.index", "tokens.ds.crc", "meta.json"
DEFINING = ("tokenizer.model", "tokenizer.json")  # the first that exists defines the tokenizer
READ_BYTES = 1 << 22

Tokens = NDArray[np.integer[Any]]


def _sha256(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
    return digest.hexdigest()


def tokenizer_sha256(path: str | Path) -> str:
    """Hash of the file that defines a tokenizer; the same wherever that file is copied.

    Args:
        path: a directory with `tokenizer.model` or `tokenizer.json`, or one such (or `.gguf`) file.

    Raises:
        UserError: if there is no such file.
    """
    path = Path(path)
    if path.is_file():
        return _sha256(path)
    for name in DEFINING:
        if (path / name).is_file():
            return _sha256(path / name)
    raise UserError(f"{path}: no tokenizer here (wanted {' or '.join(DEFINING)}, or a .gguf file)")


def _token_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class StoreWriter:
    """Writes a store document by document; the final name appears only when it is complete.

    Args:
        path: directory to create; documents go to `path + ".tmp"` until the `with` block ends.
        tokenizer_sha256: see the function of that name.
        vocab_size: number of token ids.
        bos_id: the id that every document starts with.
        eos_id: the id that every document ends with.
        source: what the tokens were made from (inputs, filter arguments), kept in `meta.json`.

    Raises:
        UserError: if `path` exists.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer_sha256: str,
        vocab_size: int,
        bos_id: int,
        eos_id: int,
        source: dict[str, Any],
    ) -> None:
        self.path = Path(path)
        if self.path.exists():
            raise UserError(f"{self.path} exists already: remove it, or write to another name")
        self._tmp = self.path.with_name(self.path.name + ".tmp")
        self._dtype = _token_dtype(vocab_size)
        self._meta: dict[str, Any] = {
            "format": FORMAT,
            "tokenizer_sha256": tokenizer_sha256,
            "vocab_size": vocab_size,
            "bos_id": bos_id,
            "eos_id": eos_id,
            "dtype": self._dtype.name,
            "source": source,
        }
        self.documents = self.tokens = 0

    def __enter__(self) -> Self:
        """Starts empty: what an interrupted run left is removed."""
        shutil.rmtree(self._tmp, ignore_errors=True)
        self._tmp.mkdir(parents=True)
        self._files = {name: (self._tmp / name).open("wb") for name in (TOKENS, INDEX, CRC)}
        return self

    def add(self, tokens: Sequence[int] | Tokens) -> None:
        """Appends one document.

        Args:
            tokens: its ids, `bos_id` first and `eos_id` last.

        Raises:
            UserError: if an end is missing or an id is outside the vocabulary.
        """
        ids = np.asarray(tokens)
        bos, eos = self._meta["bos_id"], self._meta["eos_id"]
        where = f"{self.path}, document {self.documents}"
        if ids.ndim != 1 or len(ids) < 2 or ids[0] != bos or ids[-1] != eos:
            raise UserError(f"{where}: must start with BOS ({bos}) and end with EOS ({eos})")
        if ids.min() < 0 or ids.max() >= self._meta["vocab_size"]:
            bad = int(ids.min()) if ids.min() < 0 else int(ids.max())
            raise UserError(f"{where}: token {bad} is not below {self._meta['vocab_size']}")
        data = ids.astype(self._dtype).tobytes()
        self.documents += 1
        self.tokens += len(ids)
        self._files[TOKENS].write(data)
        self._files[INDEX].write(np.array(self.tokens, "<u8").tobytes())
        self._files[CRC].write(np.array(zlib.crc32(data), "<u4").tobytes())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Publishes the store, or removes everything if the block failed."""
        try:
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
        finally:
            for file in self._files.values():
                file.close()
            if kind is not None:
                shutil.rmtree(self._tmp, ignore_errors=True)
        if kind is None:
            self._publish()

    def _publish(self) -> None:
        counts = {"documents": self.documents, "tokens": self.tokens}
        digest = _sha256(self._tmp / TOKENS, self._tmp / INDEX)
        with (self._tmp / META).open("w", encoding="utf-8") as file:
            json.dump(self._meta | counts | {"digest": digest}, file, indent=2, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        self._tmp.rename(self.path)
        parent = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)


class Store:
    """A token store, mapped into memory and read-only.

    Args:
        path: its directory.

    Attributes:
        meta: the content of `meta.json`.
        lengths: `[documents]` int64, tokens in each document.

    Raises:
        UserError: if there is no store, or its files do not fit together.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(
                f"{self.path}: no such token store (data_prep/build_store.py makes it; "
                "lab/corpus.sh those of data/lab)"
            )
        self.meta = self._read_meta()
        dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        documents, tokens = self.meta["documents"], self.meta["tokens"]
        sizes = {TOKENS: tokens * dtype.itemsize, INDEX: documents * 8, CRC: documents * 4}
        for name, size in sizes.items():
            found = (self.path / name).stat().st_size if (self.path / name).is_file() else -1
            if found != size:
                what = "is missing" if found < 0 else f"has {found} bytes"
                raise UserError(f"{self.path / name} {what}, {META} says {size}: build it again")
        ends = np.fromfile(self.path / INDEX, dtype="<u8").astype(np.int64)
        self._starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])[: len(ends)]
        self.lengths: NDArray[np.int64] = ends - self._starts
        if documents and (ends[-1] != tokens or self.lengths.min() < 1):
            raise UserError(f"{self.path / INDEX} is not a rising list of ends: build it again")
        self._crc = np.fromfile(self.path / CRC, dtype="<u4")
        self._checked = np.zeros(documents, dtype=bool)
        self._tokens: Tokens = (
            np.memmap(self.path / TOKENS, dtype=dtype, mode="r") if tokens else np.zeros(0, dtype)
        )

    def _read_meta(self) -> dict[str, Any]:
        try:
            meta: Any = json.loads((self.path / META).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path} is not a token store: no readable {META}") from error
        wanted = ("tokenizer_sha256", "vocab_size", "bos_id", "eos_id", "documents", "tokens")
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            raise UserError(f"{self.path / META}: not a token store of format {FORMAT}")
        if missing := [key for key in (*wanted, "digest") if key not in meta]:
            raise UserError(f"{self.path / META}: {missing[0]} is missing")
        if meta.get("dtype") not in ("uint16", "uint32"):
            raise UserError(f"{self.path / META}: dtype must be uint16 or uint32")
        return meta

    def __len__(self) -> int:
        """How many documents."""
        return len(self.lengths)

    def tokens(self, i: int, start: int = 0, stop: int | None = None) -> Tokens:
        """Tokens `start:stop` of document `i`, a read-only view of the file.

        Raises:
            UserError: if the document's bytes are not those that were written (checked once).
        """
        first = int(self._starts[i])
        document = self._tokens[first : first + int(self.lengths[i])]
        if not self._checked[i]:
            if zlib.crc32(document.tobytes()) != self._crc[i]:
                raise UserError(
                    f"{self.path / TOKENS}: document {i} is corrupt (CRC32 differs): build it again"
                )
            self._checked[i] = True
        return document[start:stop]

    def require_tokenizer(self, sha256: str, where: str) -> None:
        """Raises UserError unless the store was made with tokenizer `sha256`, that of `where`."""
        if sha256 != self.meta["tokenizer_sha256"]:
            raise UserError(
                f"{self.path} was made with tokenizer {self.meta['tokenizer_sha256'][:12]}, but "
                f"{where} has tokenizer {sha256[:12]}: build the store with that tokenizer"
            )

    def verify(self) -> None:
        """Reads everything once.

        Raises:
            UserError: at the first document that is corrupt, or if the digest differs.
        """
        for i in range(len(self)):
            document = self.tokens(i)
            ends = (int(document[0]), int(document[-1]))
            if ends != (self.meta["bos_id"], self.meta["eos_id"]):
                raise UserError(f"{self.path / TOKENS}: document {i} lacks BOS or EOS")
            if int(document.max()) >= self.meta["vocab_size"]:
                raise UserError(f"{self.path / TOKENS}: document {i} exceeds the vocabulary")
        if _sha256(self.path / TOKENS, self.path / INDEX) != self.meta["digest"]:
            raise UserError(f"{self.path}: digest differs from {META}: build it again")


def main(argv: list[str] | None = None) -> int:
    """`python -m longctx.data.store verify DIR`: 0 when the store is whole, else 2."""
    parser = argparse.ArgumentParser(prog="longctx", description="Token stores.")
    verify = parser.add_subparsers(required=True).add_parser("verify", help="read and check all")
    verify.add_argument("dir", help="token-store directory")
    path = parser.parse_args(argv).dir
    try:
        store = Store(path)
        store.verify()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    meta = store.meta
    print(f"ok: {meta['documents']} documents, {meta['tokens']} tokens, digest {meta['digest']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
