"""What there is to read: files and datasets, cut into pieces and dealt to units in a fixed order.

Looks at names and sizes only (of a hub's dataset, at its card): seconds for 100,000 files.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from longctx.errors import UserError

HUB = "hf:"
SUFFIXES = {
    ".jsonl": "jsonl", ".jsonl.gz": "gz", ".json.gz": "gz", ".jsonl.zst": "zst", ".json.zst": "zst",
}  # fmt: skip
RED_PAJAMA = ("arxiv", "book", "c4", "common_crawl", "github", "stackexchange", "wikipedia")
ALIASES = {name: name for name in RED_PAJAMA} | {
    "books": "book", "cc": "common_crawl", "commoncrawl": "common_crawl",
    "stack_exchange": "stackexchange", "wiki": "wikipedia",
}  # fmt: skip
# A domain and what the files of RedPajama have behind it: arxiv_023827cd-..., c4-train.00000-of-...
NAMED = re.compile(
    rf"({'|'.join(sorted(ALIASES, key=len, reverse=True))})"
    r"(?=\.|_?[0-9]|_[0-9a-f]{8}-|-train\.[0-9])"
)


@dataclass(frozen=True)
class Piece:
    """A part of one input.

    Args:
        path: the file, or what stood behind `hf:`.
        kind: `jsonl | gz | zst | hf`.
        domain: of documents that do not name theirs.
        start: first byte of a range of lines; of a dataset, the shard.
        stop: byte behind the range; of a dataset, how many shards there are.
        size: bytes of the whole file when it was found; 0 for a dataset.
        version: what tells this content from another: time of change, or a dataset's hash.
        placed: whether a folder that is named like one of RedPajama's domains gave the domain.
    """

    path: str
    kind: str
    domain: str
    start: int
    stop: int
    size: int
    version: str
    placed: bool = False

    @property
    def bytes(self) -> int:
        """Bytes to read; 0 where nobody knows."""
        return self.stop - self.start if self.kind != "hf" else 0

    def check(self) -> None:
        """Raises UserError if the file is not the one that was found."""
        if self.kind != "hf":
            path = Path(self.path)
            found = path.stat() if path.is_file() else None
            if found is None or (found.st_size, str(found.st_mtime_ns)) != (
                self.size, self.version,
            ):  # fmt: skip
                raise UserError(f"{path} has changed since the run began: start the command again")


def domain_name(label: str) -> str:
    """A folder name for a domain; RedPajama's seven under one name however they are spelt.

    Args:
        label: `cc`, `RedPajamaArXiv`, `Books`...
    """
    name = re.sub(r"[^a-z0-9_]+", "_", label.lower().removeprefix("redpajama")).strip("_")
    return ALIASES.get(name, name) or "text"


def find_pieces(inputs: Sequence[str], domains: Sequence[str], split_bytes: int) -> list[Piece]:
    """All there is to read, in the order of the inputs, then of the names.

    Args:
        inputs: files, folders (searched to any depth, links followed), `hf:NAME_OR_PATH`.
        domains: which are wanted; empty: all. Folders of RedPajama's others are not read, so what
            the records in them call themselves is not looked at.
        split_bytes: plain files above this are cut.

    Raises:
        UserError: if an input is missing, holds nothing, or is given twice.
    """
    pieces: list[Piece] = []
    for text in inputs:
        found = list(_dataset(text) if text.startswith(HUB) else _files(Path(text), split_bytes))
        if not found:
            raise UserError(f"input={text} holds nothing to read: wanted {', '.join(SUFFIXES)}")
        pieces += found
    seen: set[str] = set()
    for piece in pieces:
        if piece.start == 0:
            real = piece.path if piece.kind == "hf" else os.path.realpath(piece.path)
            if real in seen:
                raise UserError(f"{piece.path} is in the input twice")
            seen.add(real)
    wanted = [x for x in pieces if not domains or not x.placed or x.domain in domains]
    if not wanted:
        there = ", ".join(sorted({piece.domain for piece in pieces}))
        raise UserError(f"domains={list(domains)}: none is in the input, which has {there}")
    return wanted


def deal(pieces: Sequence[Piece], unit_bytes: int) -> list[list[Piece]]:
    """Units of consecutive pieces: as many as fit into `unit_bytes`, at least one.

    A dataset's shards, whose sizes nobody knows, are a unit each.
    """
    units: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        size = piece.bytes or unit_bytes
        if not units or size > room:
            units.append([])
            room = unit_bytes
        units[-1].append(piece)
        room -= size
    return units


def _files(root: Path, split_bytes: int) -> Iterator[Piece]:
    if not root.exists():
        raise UserError(f"input={root}: there is no such file or folder")
    root = Path(os.path.abspath(root))  # noqa: PTH100 - a link's target may lack the suffix
    for path in [root] if root.is_file() else sorted(_below(root)):
        kind = next((SUFFIXES[end] for end in SUFFIXES if path.name.endswith(end)), None)
        if kind is None:
            continue
        found = path.stat()
        size = found.st_size
        step = split_bytes if kind == "jsonl" else max(size, 1)
        for start in range(0, size, step):
            stop = min(start + step, size)
            domain, placed = _domain_of(path, root)
            version = str(found.st_mtime_ns)
            yield Piece(str(path), kind, domain, start, stop, size, version, placed)


def _below(root: Path) -> Iterator[Path]:
    """Files at any depth; what several links lead to comes once, by its own name if it has one."""
    top, visited = os.path.realpath(root), set()
    for folder, names, files in os.walk(root, followlinks=True):
        here, real = Path(folder), os.path.realpath(folder)
        link = here != root and here.is_symlink()
        if real in visited or (link and Path(real).is_relative_to(top)):  # found without the link
            names.clear()
            continue
        visited.add(real)
        names.sort()
        found = (here / name for name in files if ".json" in name)
        yield from (path for path in found if path.is_file())


def _domain_of(path: Path, root: Path) -> tuple[str, bool]:
    """RedPajama's, by the innermost folder or the file; else the outermost folder below `root`.

    Of a file that is given itself, the folder it is in and its own name.

    Returns:
        The domain, and whether it is RedPajama's by a folder.
    """
    base = root if root.is_dir() else root.parent
    folders = [base.name, *path.relative_to(base).parts[:-1]]
    for name in reversed(folders):
        if domain_name(name) in RED_PAJAMA:
            return domain_name(name), True
    if named := NAMED.match(path.name.lower()):
        return ALIASES[named[1]], False
    stem = path.name.split(".")[0]
    return domain_name(stem if root == path else (folders[1:] or folders)[0]), False


def _dataset(text: str) -> Iterator[Piece]:
    name = text.removeprefix(HUB)
    path = Path(name).expanduser()
    if path.exists():
        name = str(path.resolve())
    rows, version = open_dataset(name)
    columns = rows.column_names or ["text"]
    if "text" not in columns:
        raise UserError(f"input={text} has no column text, only {', '.join(columns)}")
    if path.exists():
        version += _fingerprint(path)
    version = hashlib.sha256(version.encode()).hexdigest()[:16]
    domain, shards = domain_name(Path(name).name), rows.num_shards
    placed = path.is_dir() and domain in RED_PAJAMA
    for shard in range(shards):
        yield Piece(name, "hf", domain, shard, shards, 0, version, placed)


def _fingerprint(path: Path) -> str:
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return " ".join(f"{p} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files)


@cache
def open_dataset(name: str) -> tuple[Any, str]:
    """The training split of a Hugging Face dataset, streamed, and the hash of what it holds.

    Args:
        name: of the hub, or a directory: of parquet or JSONL files, or as `save_to_disk` leaves it.

    Raises:
        UserError: if it cannot be opened or has no training split.
    """
    import datasets  # three seconds

    try:
        if any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(name)
            saved = saved["train"] if isinstance(saved, datasets.DatasetDict) else saved
            shards = max(1, len(saved.cache_files))
            return saved.to_iterable_dataset(num_shards=shards), str(saved._fingerprint)
        version = datasets.load_dataset_builder(name).hash or ""
        return datasets.load_dataset(name, split="train", streaming=True), str(version)
    except (OSError, ValueError, KeyError) as error:  # no such name, no such split
        reason = " ".join(str(error).split())
        raise UserError(f"input={HUB}{name} cannot be opened: {reason}") from error
