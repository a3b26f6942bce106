"""Stage two, one task: shards -> one token store per domain, filtered by length and deduplicated.

Shards are read in the order of the units, so the result does not depend on which worker tokenised
what. Memory: one byte per document, and about 60 for each that is long enough. Time: that of
copying and hashing the kept tokens.
"""

import dataclasses
import hashlib
import json
import resource
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.pipeline.base import PipelineStep
from numpy.typing import NDArray

from longctx.data.store import Store, StoreWriter
from longctx.data_prep.inputs import Piece
from longctx.data_prep.summary import DUPLICATE, KEPT, TOO_SHORT, Summary, draw
from longctx.data_prep.work import REPORT, Work, write_atomically
from longctx.errors import UserError

SUMMARY, FIGURE, DROPPED = "summary.json", "summary.png", "dropped.jsonl"
FILES_OF_STORE, OTHER_FILES = 3, 256  # open at a time

Fates = NDArray[np.uint8]


@dataclass(frozen=True)
class Rules:
    """The rules that decide which documents of the shards are kept.

    Args:
        inputs: what was read, as the user wrote it; only recorded.
        min_tokens: shortest document kept, tokens.
        min_tokens_of: the same limit for single domains.
        deduplicate: keep only the first of several documents with the same text.
        domains: domains that must occur in the input.
        max_bad_fraction: share of records that may be unreadable.
    """

    inputs: list[str]
    min_tokens: int
    min_tokens_of: dict[str, int]
    deduplicate: bool
    domains: list[str]
    max_bad_fraction: float

    def least(self, domain: str) -> int:
        """Shortest document of `domain` that is kept, tokens."""
        return self.min_tokens_of.get(domain, self.min_tokens)

    def identity(self, work: Work) -> str:
        """Hash of everything that determines the content of the output."""
        deciding = [work.folder.name, self.min_tokens, self.min_tokens_of, self.deduplicate]
        text = json.dumps(deciding, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class AssembleStep(PipelineStep):  # type: ignore[misc]
    """Builds the output from finished shards.

    Args:
        folder: of the plan, see `longctx.data_prep.work`.
        output: directory to create.
        rules: which documents are kept.
    """

    name = "assemble"
    type = "longctx"

    def __init__(self, folder: Path, output: Path, rules: Rules) -> None:
        super().__init__()
        self.folder, self.output, self.rules = folder, output, rules

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Reads all shards, writes the output; see `assemble`."""
        assemble(Work(self.folder), self.output, self.rules)


@dataclass(frozen=True)
class Shard:
    """A finished shard, opened for reading.

    Args:
        rank: the task that made it.
        report: the task's counts.
        names: domains by index.
        table: `[documents]` domain index and text hash of each document.
        store: the tokens.
    """

    rank: int
    report: dict[str, Any]
    names: list[str]
    table: NDArray[Any]
    store: Store


def shards(work: Work) -> Iterator[Shard]:
    """Yields every shard in order.

    Raises:
        UserError: if one is missing or damaged; its task then runs again next time.
    """
    for rank in range(work.tasks):
        folder = work.shard(rank)
        try:
            report = json.loads((folder / REPORT).read_text("utf-8"))
            table = np.load(folder / "table.npy", allow_pickle=False)
            store = Store(folder / "store")
            if len(table) != len(store):
                raise UserError("table.npy and the store have different numbers of documents")
        except (OSError, ValueError) as error:  # UserError is a ValueError
            raise _damaged(work, rank, error) from error
        yield Shard(rank, report, report["domains"], table, store)


def _damaged(work: Work, rank: int, error: Exception) -> UserError:
    work.forget(rank)
    return UserError(
        f"{work.shard(rank)} is damaged ({error}): the same command tokenises it again"
    )


def assemble(work: Work, output: Path, rules: Rules) -> Summary:
    """Writes `output`, which appears only when it is complete.

    Args:
        work: the work folder, with all shards finished.
        output: directory to create.
        rules: which documents are kept.

    Raises:
        UserError: if a shard is damaged, too many records are unreadable, a requested domain does
            not occur, no document is left, there are too many domains, or `output` exists.
    """
    summary = Summary(rules.identity(work), dataclasses.asdict(rules))
    dropped = _count(work, summary)
    _check(summary, rules)
    fates = _fates(work, rules)
    if output.exists():
        raise UserError(f"{output} exists already: remove it, or choose another output=")
    _allow_files(len(summary.domains))
    tmp = output.with_name(output.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        tmp.mkdir(parents=True)
        _write_stores(work, tmp, fates, summary)
        write_atomically(tmp / DROPPED, "".join(json.dumps(line) + "\n" for line in dropped))
        draw(summary, tmp / FIGURE)
        text = json.dumps(summary.as_dict(), indent=2, sort_keys=True)
        write_atomically(tmp / SUMMARY, text + "\n")
        tmp.rename(output)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    return summary


def _allow_files(domains: int) -> None:
    """Raises the limit of open files, so that the stores of all domains can be open at once."""
    needed = FILES_OF_STORE * domains + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"{domains} domains need {needed} open files and the system allows {hard}: choose "
            "fewer with domains=, or raise the hard limit (ulimit -Hn)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _count(work: Work, summary: Summary) -> list[dict[str, Any]]:
    """Adds up the reports; returns one entry for each dropped evaluation document."""
    dropped = []
    lines: Counter[str] = Counter()  # lines of each file before the current piece
    for shard in shards(work):
        pieces = work.unit(shard.rank)
        first = []
        for piece, count in zip(pieces, shard.report["lines"], strict=True):
            first.append(lines[piece.path] if piece.kind != "hf" else 0)
            lines[piece.path] += count
        for hit in shard.report["hits"]:
            place = _place(pieces, first, hit)
            dropped.append(place | {"domain": hit["domain"], "reason": hit["reason"]})
        for bad in shard.report["bad"]:
            summary.show(_place(pieces, first, bad) | {"kind": bad["kind"], "note": bad["note"]})
        summary.add_report(shard.report)
    return dropped


def _place(pieces: list[Piece], first: list[int], entry: dict[str, Any]) -> dict[str, Any]:
    piece = pieces[entry["piece"]]
    shard = f" (shard {piece.start} of {piece.stop})" if piece.kind == "hf" else ""
    return {"file": piece.path + shard, "line": first[entry["piece"]] + entry["line"]}


def _check(summary: Summary, rules: Rules) -> None:
    bad = sum(summary.bad.values())
    if bad > rules.max_bad_fraction * summary.records:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(summary.bad.items()))
        places = [f"{x['file']}:{x['line']} ({x['kind']})" for x in summary.shown[:3]]
        raise UserError(
            f"{bad} of {summary.records} records cannot be read ({kinds}), more than "
            f"max_bad_fraction={rules.max_bad_fraction}: nothing was written; see "
            + ", ".join(places)
        )
    wanted = [*rules.domains, *rules.min_tokens_of]
    if missing := [name for name in wanted if name not in summary.domains]:
        there = ", ".join(sorted(summary.domains)) or "none of the requested domains"
        raise UserError(f"domain {missing[0]} does not occur in the input, which has {there}")


def _fates(work: Work, rules: Rules) -> list[Fates]:
    """The fate of each document of each shard, as an index in `FATES`."""
    fates: list[Fates] = []
    hashes: list[NDArray[Any]] = []  # of the texts that are long enough
    longest = 0
    for shard in shards(work):
        least = np.array([rules.least(name) for name in shard.names], np.int64)
        short = shard.store.lengths < least[shard.table["domain"]]
        fates.append(np.where(short, np.uint8(TOO_SHORT), np.uint8(KEPT)))
        hashes.append(shard.table[["high", "low"]][~short])
        longest = max(longest, int(shard.store.lengths.max(initial=0)))
    if rules.deduplicate:
        repeated = _repeated(np.concatenate(hashes))
        for fate, part in zip(fates, _split(repeated, [len(x) for x in hashes]), strict=True):
            fate[fate == KEPT] = np.where(part, np.uint8(DUPLICATE), np.uint8(KEPT))
    if not any((fate == KEPT).any() for fate in fates):
        raise UserError(f"no document is left: the longest has {longest} tokens, see min_tokens=")
    return fates


def _repeated(hashes: NDArray[Any]) -> NDArray[np.bool_]:
    """`[n]` bool: whether an earlier entry is equal."""
    order = np.lexsort((hashes["low"], hashes["high"]))  # stable: equal entries stay in order
    ordered = hashes[order]
    again = np.zeros(len(hashes), bool)
    again[order[1:][ordered[1:] == ordered[:-1]]] = True
    return again


def _split(flags: NDArray[np.bool_], sizes: list[int]) -> list[NDArray[np.bool_]]:
    return np.split(flags, np.cumsum(sizes)[:-1])


def _write_stores(work: Work, tmp: Path, fates: list[Fates], summary: Summary) -> None:
    """Copies the kept documents into one store per domain in `tmp`, and counts them."""
    writers: dict[str, StoreWriter] = {}
    with ExitStack() as stack:
        for shard, fate in zip(shards(work), fates, strict=True):
            summary.add_documents(shard.names, shard.table["domain"], shard.store.lengths, fate)
            for i in np.flatnonzero(fate == KEPT):
                name = shard.names[shard.table["domain"][i]]
                if name not in writers:
                    writer = _writer(tmp / name, shard.store.meta, name, work, summary)
                    writers[name] = stack.enter_context(writer)
                try:
                    tokens = shard.store.tokens(int(i))
                except UserError as error:
                    raise _damaged(work, shard.rank, error) from error
                writers[name].add(tokens)


def _writer(
    path: Path, meta: dict[str, Any], domain: str, work: Work, summary: Summary
) -> StoreWriter:
    source = {"domain": domain, "plan": work.folder.name, "rules": summary.rules}
    return StoreWriter(
        path, meta["tokenizer_sha256"], meta["vocab_size"], meta["bos_id"], meta["eos_id"], source
    )
