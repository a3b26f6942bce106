"""Finds the input: files and datasets, split into pieces and grouped into units in a fixed order.

Reads only names and sizes (for a dataset on the hub, its card): seconds for 100,000 files.
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
# A domain and what follows it in RedPajama's file names: arxiv_023827cd-..., c4-train.00000-of-...
NAMED = re.compile(
    rf"({'|'.join(sorted(ALIASES, key=len, reverse=True))})"
    r"(?=\.|_?[0-9]|_[0-9a-f]{8}-|-train\.[0-9])"
)


@dataclass(frozen=True)
class Piece:
    """A part of one input.

    Args:
        path: the file, or the text after `hf:`.
        kind: `jsonl | gz | zst | hf`.
        domain: domain of documents that do not name their own.
        start: first byte of the range of lines; for a dataset, the index of the shard.
        stop: end of the range, exclusive; for a dataset, the number of shards.
        size: bytes of the whole file when it was found; 0 for a dataset.
        version: identifies the content: modification time, or a dataset's hash.
        placed: whether `domain` comes from a folder named like one of RedPajama's domains.
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
        """Bytes to read; 0 if unknown."""
        return self.stop - self.start if self.kind != "hf" else 0

    def check(self) -> None:
        """Raises UserError if the file has changed since it was found."""
        if self.kind != "hf":
            path = Path(self.path)
            found = path.stat() if path.is_file() else None
            if found is None or (found.st_size, str(found.st_mtime_ns)) != (
                self.size, self.version,
            ):  # fmt: skip
                raise UserError(f"{path} has changed since the run began: start the command again")


def domain_name(label: str) -> str:
    """A folder name for a domain; each spelling of RedPajama's seven gives the same name.

    Args:
        label: for example `cc`, `RedPajamaArXiv` or `Books`.
    """
    name = re.sub(r"[^a-z0-9_]+", "_", label.lower().removeprefix("redpajama")).strip("_")
    return ALIASES.get(name, name) or "text"


def find_pieces(inputs: Sequence[str], domains: Sequence[str], split_bytes: int) -> list[Piece]:
    """All pieces of the input, in the order of the inputs, then of the names.

    Args:
        inputs: files, folders (searched to any depth, links followed), `hf:NAME_OR_PATH`.
        domains: domains to read; empty: all. Folders of RedPajama's other domains are skipped
            without reading the labels of the records in them.
        split_bytes: plain files larger than this are split.

    Raises:
        UserError: if an input is missing, contains nothing to read, or is given twice.
    """
    pieces: list[Piece] = []
    for text in inputs:
        found = list(_dataset(text) if text.startswith(HUB) else _files(Path(text), split_bytes))
        if not found:
            raise UserError(f"input={text} contains none of {', '.join(SUFFIXES)}")
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
    """Groups consecutive pieces into units: as many as fit into `unit_bytes`, at least one.

    The size of a dataset's shards is unknown, so each of them is a unit.
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
    """Files at any depth; one with several links comes once, by its own name if it has one."""
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
    """The domain of a file, from its place.

    It is RedPajama's if the innermost folder or the file is named so; otherwise the outermost
    folder below `root`. If `root` is the file itself, its folder and its own name are used.

    Returns:
        The domain, and whether a folder with one of RedPajama's names gave it.
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
    """The training split of a Hugging Face dataset, streamed, and a hash of its content.

    Args:
        name: name on the hub, or a directory of parquet or JSONL files or made by `save_to_disk`.

    Raises:
        UserError: if it cannot be opened or has no training split.
    """
    import datasets  # takes three seconds

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
