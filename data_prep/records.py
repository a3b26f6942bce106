"""Reads the records of a piece of the input.

A piece is a byte range of a plain `.jsonl` file, a whole `.gz` or `.zst` archive, or a shard of a
Hugging Face dataset; a unit is a list of pieces that one task reads. Both depend only on the inputs
and the size of a unit, so the documents and their order do not depend on the workers.

Memory: one line, and one block of an archive. JSON is parsed at about 500 MB per second.
"""

import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import orjson
import zstandard

from longctx.data_prep.inputs import Piece, domain_name, open_dataset

BAD = ("not_json", "wrong_type", "no_text", "invalid_utf8", "line_too_long", "truncated_archive")
BLOCK = 1 << 17  # bytes of an archive that are decompressed at a time
LONGEST_LINE = 1 << 28  # bytes; a longer line is reported as unreadable
LABELS = ("redpajama_set_name", "red_pajama_subset")  # fields in which a record names its domain


@dataclass(frozen=True)
class Record:
    """One document.

    Args:
        line: number within its piece, from 1.
        text: the document.
        domain: the domain it belongs to.
        row: all fields of the record.
    """

    line: int
    text: str
    domain: str
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Bad:
    """A record that cannot be read.

    Args:
        line: number within its piece, from 1.
        kind: one of `BAD`.
        note: the parser's message.
    """

    line: int
    kind: str
    note: str


class Reader:
    """Reads one piece.

    Args:
        piece: the piece to read.

    Attributes:
        lines: lines (rows of a dataset) read so far.
        done: bytes of the file read so far (for a dataset: characters of text).
    """

    def __init__(self, piece: Piece) -> None:
        self.piece = piece
        self.lines = self.done = 0

    def __iter__(self) -> Iterator[Record | Bad]:
        """Yields every record in order; blank lines are skipped."""
        if self.piece.kind == "hf":
            yield from self._rows()
            return
        with open(self.piece.path, "rb") as file:  # noqa: PTH123 - the path is kept as text
            try:
                yield from self._records(file)
            except (EOFError, zlib.error, zstandard.ZstdError) as error:
                yield Bad(self.lines + 1, "truncated_archive", f"{error}: the rest is not read")

    def _records(self, file: BinaryIO) -> Iterator[Record | Bad]:
        source = self._plain(file) if self.piece.kind == "jsonl" else self._archive(file)
        for line in source:
            self.lines += 1
            if len(line) > LONGEST_LINE:
                yield Bad(self.lines, "line_too_long", f"above {LONGEST_LINE >> 20} MiB")
            elif line.strip():
                yield self._record(line)

    def _plain(self, file: BinaryIO) -> Iterator[bytes]:
        """The lines whose first byte is in the piece's range."""
        start, stop = self.piece.start, self.piece.stop
        if start:  # a line that begins before the range belongs to the range before
            file.seek(start - 1)
            start += sum(map(len, _whole_line(file))) - 1
        while start < stop and (line := _bounded_line(file)):
            start = file.tell()
            self.done = min(start, stop) - self.piece.start
            yield line

    def _archive(self, file: BinaryIO) -> Iterator[bytes]:
        stream = io.BufferedReader(Archive(file, self.piece.kind), BLOCK)
        while line := _bounded_line(stream):
            self.done = file.tell()
            yield line

    def _rows(self) -> Iterator[Record | Bad]:
        import pyarrow

        try:
            rows, _ = open_dataset(self.piece.path)
            for row in rows.shard(self.piece.stop, self.piece.start):
                self.lines += 1
                found = self._checked(row)
                self.done += len(found.text) if isinstance(found, Record) else 0
                yield found
        except (pyarrow.ArrowException, OSError, EOFError) as error:
            first = str(error).split("\n", maxsplit=1)[0]
            yield Bad(self.lines + 1, "truncated_archive", f"{first}: the rest is not read")

    def _record(self, line: bytes) -> Record | Bad:
        try:
            row = orjson.loads(line)
        except ValueError:
            try:  # slower, but accepts NaN, huge integers, and lone surrogates in other fields
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                return Bad(self.lines, "invalid_utf8", error.reason)
            except (ValueError, RecursionError) as error:
                return Bad(self.lines, "not_json", str(error))
        return self._checked(row)

    def _checked(self, row: Any) -> Record | Bad:
        if not isinstance(row, dict):
            return Bad(self.lines, "wrong_type", f"a {type(row).__name__}, not an object")
        text = row.get("text")
        if text is None or text == "":
            return Bad(self.lines, "no_text", "text is " + ("missing" if text is None else "empty"))
        if not isinstance(text, str):
            return Bad(self.lines, "wrong_type", f"text is a {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError:
            return Bad(self.lines, "invalid_utf8", "text holds half of a surrogate pair")
        return Record(self.lines, text, self._domain(row), row)

    def _domain(self, row: Mapping[str, Any]) -> str:
        """The domain that the record names, or else that of its piece."""
        meta = row.get("meta")
        if isinstance(meta, str) and LABELS[0] in meta:  # the hub's loader stores it as JSON
            try:
                meta = orjson.loads(meta)
            except ValueError:
                meta = None
        for place in (meta, row):
            for label in LABELS:
                name = place.get(label) if isinstance(place, Mapping) else None
                if isinstance(name, str) and name:
                    return domain_name(name)
        return self.piece.domain


class Archive(io.RawIOBase):
    """The content of a `.gz` or `.zst` stream with any number of members, one block at a time.

    Unlike the libraries' own readers, both kinds raise `EOFError` if the file is truncated.

    Args:
        file: the archive.
        kind: `gz` or `zst`.
    """

    def __init__(self, file: BinaryIO, kind: str) -> None:
        self._file = file
        self._new: Callable[[], Any] = (
            partial(zlib.decompressobj, 31)
            if kind == "gz"
            else zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        )
        self._padding = b"\0" if kind == "gz" else b""  # gzip allows zeros between members
        self._member: Any = None
        self._data = memoryview(b"")

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills `buffer` with the next bytes; returns their number, 0 at the end.

        Raises:
            EOFError: if the file ends inside a member.
        """
        while not self._data:
            block = self._next_block()
            if not block:
                if self._member is not None:
                    raise EOFError("the archive is truncated")
                return 0
            if self._member is None:
                self._member = self._new()
            self._data = memoryview(self._member.decompress(block))
        size = min(len(buffer), len(self._data))
        buffer[:size] = self._data[:size]
        self._data = self._data[size:]
        return size

    def _next_block(self) -> bytes:
        rest: bytes = b""
        if self._member is not None and self._member.eof:
            rest = self._member.unused_data.lstrip(self._padding)
            self._member = None
        while not rest and (rest := self._file.read(BLOCK)) and self._member is None:
            rest = rest.lstrip(self._padding)
        return rest


def _whole_line(file: BinaryIO) -> Iterator[bytes]:
    """The rest of the current line, in parts."""
    while part := file.readline(BLOCK):
        yield part
        if part.endswith(b"\n"):
            return


def _bounded_line(file: BinaryIO) -> bytes:
    """The next line, cut off shortly after `LONGEST_LINE` bytes."""
    line = file.readline(LONGEST_LINE + 1)
    if len(line) > LONGEST_LINE and not line.endswith(b"\n"):
        for _ in _whole_line(file):
            pass
    return line
