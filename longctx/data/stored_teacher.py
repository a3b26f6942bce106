"""A stored teacher: the most probable next tokens of every position of every row, in row order.

A directory of parts, `part_000000.safetensors` with `ids [n s k]` (uint16, uint32 above 65,536
entries), `probabilities [n s k+1]` (float16, the last one of all other tokens together) and
`crc [n]` (CRC32 of a row's bytes), beside `meta.json`, which says of which rows, of which model and
how many. Row `n` belongs to sample `n` of the run's one global order. A part is complete or
absent, so writing resumes where it ended, in any number of processes.
`s x (2k + 2 + k x (2 or 4))` bytes a row: 202 a position with k = 50 and 32,000 entries.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from longctx.data.corpus import Row
from longctx.errors import UserError

FORMAT = 1
META = "meta.json"
PART_BYTES = 256 << 20  # a part is made in memory
OPEN_PARTS = 4

Array = NDArray[Any]


@dataclass(frozen=True)
class Plan:
    """What a stored teacher holds.

    Args:
        rows: samples 0 to rows - 1 of a run's order.
        seq_len: positions s of a row.
        top_k: k.
        temperature: of the probabilities.
        vocab_size: of the model.
        model: digest of the teacher's weights.
        identity: the loader's, which decides the rows and their order.
    """

    rows: int
    seq_len: int
    top_k: int
    temperature: float
    vocab_size: int
    model: str
    identity: dict[str, str]

    @property
    def id_type(self) -> np.dtype[Any]:
        """The narrowest type of the ids."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    @property
    def row_bytes(self) -> int:
        """On disk."""
        return self.seq_len * (self.top_k * self.id_type.itemsize + 2 * (self.top_k + 1))

    @property
    def part_rows(self) -> int:
        """Rows of a part."""
        return max(1, PART_BYTES // self.row_bytes)

    @property
    def parts(self) -> int:
        """How many, the last one perhaps shorter."""
        return -(-self.rows // self.part_rows)

    def samples(self, part: int) -> range:
        """Those of one part."""
        first = part * self.part_rows
        return range(first, min(first + self.part_rows, self.rows))


def part_name(part: int) -> str:
    """File of one part."""
    return f"part_{part:06d}.safetensors"


def begin(path: Path, plan: Plan) -> list[int]:
    """Opens a directory for writing, or an incomplete one to resume it.

    Args:
        path: the directory.
        plan: what it will hold.

    Returns:
        The missing parts.

    Raises:
        UserError: if it was begun for something else.
    """
    if (path / META).exists():
        if differs := _difference(asdict(_read(path)), asdict(plan)):
            raise UserError(f"{path} was begun for {differs}: take another teacher.store")
    else:
        path.mkdir(parents=True, exist_ok=True)
        part = path / f"{META}.{os.getpid()}"
        text = json.dumps({"format": FORMAT, **asdict(plan)}, indent=2, sort_keys=True)
        _write_whole(part, path / META, lambda: part.write_text(text, encoding="utf-8"))
    return _missing(path, plan)


def write_part(path: Path, plan: Plan, part: int, rows: Iterator[tuple[Array, Array]]) -> None:
    """Writes one part.

    Args:
        path: the directory.
        plan: as `begin` had it.
        part: its number.
        rows: (ids `[s k]`, probabilities `[s k+1]`) of each of its samples, in order.
    """
    count = len(plan.samples(part))
    ids = np.empty((count, plan.seq_len, plan.top_k), plan.id_type)
    probabilities = np.empty((count, plan.seq_len, plan.top_k + 1), np.float16)
    for at, (row_ids, row_probabilities) in zip(range(count), rows, strict=True):
        ids[at], probabilities[at] = row_ids, row_probabilities
    crc = [_crc(a, b) for a, b in zip(ids, probabilities, strict=True)]
    tensors = {"ids": ids, "probabilities": probabilities, "crc": np.array(crc, np.uint32)}
    temporary = path / f"{part_name(part)}.{os.getpid()}"
    _write_whole(temporary, path / part_name(part), lambda: save_file(tensors, temporary))


def _write_whole(temporary: Path, final: Path, write: Callable[[], Any]) -> None:
    """Writes under a temporary name and renames once all of it is on disk."""
    try:
        write()
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.rename(final)
    finally:
        temporary.unlink(missing_ok=True)


def _crc(ids: Array, probabilities: Array) -> int:
    return zlib.crc32(probabilities.tobytes(), zlib.crc32(ids.tobytes()))


def _read(path: Path) -> Plan:
    try:
        meta: Any = json.loads((path / META).read_text(encoding="utf-8"))
        if meta.pop("format") != FORMAT:
            raise UserError(f"{path / META}: not a stored teacher of format {FORMAT}")
        return Plan(**meta)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"teacher.store={path} is no stored teacher: no readable {META} "
            "(longctx teacher writes one)"
        ) from error


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """The first entry that differs, as a phrase; empty if none does."""
    for key in sorted(theirs.keys() | ours.keys()):
        was, now = theirs.get(key), ours.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            if inner := _difference(was, now):
                return inner
        elif was != now:
            return f"{key}={was}, not {now}"
    return ""


def _missing(path: Path, plan: Plan) -> list[int]:
    there = {entry.name for entry in os.scandir(path)}
    return [part for part in range(plan.parts) if part_name(part) not in there]


class StoredTeacher:
    """A stored teacher, read row by row.

    Args:
        path: its directory.

    Raises:
        UserError: if there is none, or it is not complete.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.plan = _read(self.path)
        if missing := _missing(self.path, self.plan):
            raise UserError(
                f"{self.path} lacks {len(missing)} of {self.plan.parts} parts: "
                "longctx teacher with the same settings writes what is missing"
            )
        self._open = lru_cache(maxsize=OPEN_PARTS)(self._open_part)

    def require(self, *, rows: int, seq_len: int, top_k: int, temperature: float) -> None:
        """Raises UserError unless it holds as many rows of that form."""
        own = self.plan
        wanted = {"seq_len": seq_len, "top_k": top_k, "temperature": temperature}
        if differs := _difference({key: getattr(own, key) for key in wanted}, wanted):
            raise UserError(f"{self.path} was written with {differs}")
        if own.rows < rows:
            raise UserError(
                f"{self.path} holds {own.rows:,} rows, and the run reads {rows:,}: lower "
                "train.max_steps, or write another"
            )

    def require_rows(self, identity: dict[str, str]) -> None:
        """Raises UserError unless its rows are those of a loader with that identity."""
        if differs := _difference(self.plan.identity, identity):
            raise UserError(f"{self.path} is of other rows: written with {differs}")

    def require_model(self, digest: str) -> None:
        """Raises UserError unless that is the digest of the model that it was computed with."""
        if digest != self.plan.model:
            raise UserError(
                f"{self.path} was computed with other weights, or another train.dtype, than this "
                f"decoder's: {self.plan.model[:12]}, not {digest[:12]}"
            )

    def with_teacher(self, row: Row, sample: int) -> Row:
        """A row of the loader, with what is stored of it.

        Raises:
            UserError: if that is damaged.
        """
        ids, probabilities = self.read(sample)
        return {
            **row,
            "teacher_ids": ids.astype(np.int64),
            "teacher_probabilities": probabilities,
        }

    def read(self, sample: int) -> tuple[Array, Array]:
        """The ids `[s k]` and probabilities `[s k+1]` of a sample.

        Raises:
            UserError: if they are damaged.
        """
        part, at = divmod(sample, self.plan.part_rows)
        file = self.path / part_name(part)
        try:
            tensors, checks = self._open(part)
            ids, probabilities = (tensors[name][at] for name in ("ids", "probabilities"))
        except (OSError, SafetensorError, IndexError, KeyError) as error:
            raise UserError(f"{file} is damaged ({error}): {_AGAIN}") from error
        shapes = (self.plan.seq_len, self.plan.top_k), (self.plan.seq_len, self.plan.top_k + 1)
        if (ids.shape, probabilities.shape) != shapes or _crc(ids, probabilities) != checks[at]:
            raise UserError(f"{file} is damaged (CRC32 of row {at} differs): {_AGAIN}")
        return ids, probabilities

    def _open_part(self, part: int) -> tuple[dict[str, Any], Array]:
        with safe_open(self.path / part_name(part), framework="np") as file:
            slices = {name: file.get_slice(name) for name in ("ids", "probabilities")}
            return slices, file.get_tensor("crc")


_AGAIN = "remove it, and longctx teacher writes it again"
