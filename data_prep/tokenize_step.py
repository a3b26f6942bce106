"""Stage one, one task per unit: records -> a shard of tokens. Run by datatrove's executors.

A shard is a token store with `table.npy` (domain and hash of each document) and `report.json`
(counts and dropped documents) beside it. Length limits are not applied here, so changing them does
not tokenise again. Memory: the documents of one batch, about 100 MB for a text of 4 million tokens.
"""

import hashlib
import json
import os
import shutil
import socket
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.pipeline.base import PipelineStep

from longctx.data.store import StoreWriter
from longctx.data_prep.decontaminate import Evaluation
from longctx.data_prep.encode import Encoder, load_encoder
from longctx.data_prep.inputs import Piece
from longctx.data_prep.records import Bad, Reader, Record
from longctx.data_prep.work import REPORT, Work, write_atomically
from longctx.errors import UserError

BATCH_CHARACTERS = 1 << 20  # texts that are encoded together
SHOWN = 10  # unreadable records that a shard lists
TICK = 1.0  # seconds between progress reports
TABLE = np.dtype([("domain", "<u4"), ("high", "<u8"), ("low", "<u8")])

EvaluationArguments = tuple[tuple[Path, ...], tuple[Path, ...], int, float]


class TokenizeStep(PipelineStep):  # type: ignore[misc]
    """Tokenises the unit with the number of its task.

    Args:
        folder: of the plan, see `longctx.data_prep.work`.
        tokenizer: folder or file of the tokenizer.
        evaluation: files, titles, window and fraction for `Evaluation.load`.
        domains: domains to keep; empty: all.
        min_bytes: documents with fewer bytes are dropped.
    """

    name = "tokenize"
    type = "longctx"

    def __init__(
        self,
        folder: Path,
        tokenizer: Path,
        evaluation: EvaluationArguments,
        domains: list[str],
        min_bytes: int,
    ) -> None:
        super().__init__()
        self.folder = folder
        self.tokenizer = tokenizer
        self.evaluation = evaluation
        self.domains = domains
        self.min_bytes = min_bytes

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Reads the unit and writes the shard, unless it is already there.

        Raises:
            UserError: if a file, the tokenizer or the evaluation texts changed since planning.
        """
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tasks run in parallel, not threads
        work = Work(self.folder)
        if work.finished(
            rank
        ):  # the task died before it was marked as done, or another job was faster
            return
        encoder, evaluation = _encoder(self.tokenizer), _evaluation(self.evaluation)
        deciding = work.plan["deciding"]
        if (encoder.sha256, evaluation.identity) != (deciding["tokenizer"], deciding["evaluation"]):
            raise UserError(
                "tokenizer= or evaluation files changed since the run began: start it again"
            )
        final = work.shard(rank)
        tmp = final.with_name(f"{final.name}.tmp-{socket.gethostname()}-{os.getpid()}")
        shutil.rmtree(tmp, ignore_errors=True)
        with self.track_time(unit="unit"):
            shard = _Shard(self, encoder, evaluation, tmp)
            shard.read(work.unit(rank), work.progress(rank))
            if not work.finished(rank):  # an incomplete old shard
                shutil.rmtree(final, ignore_errors=True)
            try:
                tmp.rename(final)
            except OSError:
                if not work.finished(rank):
                    raise
                shutil.rmtree(tmp)  # another job wrote the same shard, and may be reading it
        self.stat_update("documents", value=shard.writer.documents)
        self.stat_update("tokens", value=shard.writer.tokens)
        work.progress(rank).unlink(missing_ok=True)


class _Shard:
    """The shard that one task writes, and the documents that wait to be encoded."""

    def __init__(
        self, step: TokenizeStep, encoder: Encoder, evaluation: Evaluation, folder: Path
    ) -> None:
        self.step, self.encoder, self.evaluation, self.folder = step, encoder, evaluation, folder
        self.waiting: list[str] = []
        self.characters = 0
        self.domains: dict[str, int] = {}
        self.rows: list[tuple[int, bytes]] = []
        self.counts: dict[str, Counter[str]] = {"bad": Counter(), "too_few_bytes": Counter()}
        self.bad: list[dict[str, Any]] = []
        self.hits: list[dict[str, Any]] = []
        self.lines: list[int] = []
        self.records = self.other_domain = 0
        self.writer = StoreWriter(
            folder / "store", encoder.sha256, encoder.vocab_size, encoder.bos_id, encoder.eos_id, {}
        )

    def read(self, pieces: list[Piece], progress: Path) -> None:
        """Reads all pieces of a unit, then writes the table and the report."""
        ticker = _Ticker(progress)
        with self.writer:
            for number, piece in enumerate(pieces):
                piece.check()
                reader = Reader(piece)
                for record in reader:
                    self._take(number, record)
                    ticker.tick(reader.done)
                self.lines.append(reader.lines)
                ticker.next(piece.bytes or reader.done)
            self._encode()
        table = np.zeros(len(self.rows), TABLE)
        if self.rows:
            table["domain"] = [domain for domain, _ in self.rows]
            digests = np.frombuffer(b"".join(digest for _, digest in self.rows), "<u8")
            table["high"], table["low"] = digests[::2], digests[1::2]
        np.save(self.folder / "table.npy", table)
        report = {
            "records": self.records, "counts": self.counts, "other_domain": self.other_domain,
            "domains": list(self.domains), "lines": self.lines, "bad": self.bad, "hits": self.hits,
        }  # fmt: skip
        write_atomically(self.folder / REPORT, json.dumps(report))

    def _take(self, piece: int, record: Record | Bad) -> None:
        self.records += 1
        place = {"piece": piece, "line": record.line}
        if isinstance(record, Bad):
            self.counts["bad"][record.kind] += 1
            if len(self.bad) < SHOWN:
                self.bad.append(place | {"kind": record.kind, "note": record.note})
            return
        if self.step.domains and record.domain not in self.step.domains:
            self.other_domain += 1
            return
        data = record.text.encode()
        if len(data) < self.step.min_bytes:
            self.counts["too_few_bytes"][record.domain] += 1
            return
        if reason := self.evaluation.hit(record.text, record.row):
            self.hits.append(place | {"domain": record.domain, "reason": reason})
            return
        domain = self.domains.setdefault(record.domain, len(self.domains))
        self.rows.append((domain, hashlib.blake2b(data, digest_size=16).digest()))
        self.waiting.append(record.text)
        self.characters += len(record.text)
        if self.characters >= BATCH_CHARACTERS:
            self._encode()

    def _encode(self) -> None:
        for ids in self.encoder.documents(self.waiting):
            self.writer.add(ids)
        self.waiting, self.characters = [], 0


class _Ticker:
    """Writes a task's progress to a file once a second, for the main process's progress bar."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = 0  # bytes of finished pieces
        self._due = 0.0

    def tick(self, done: int) -> None:
        """Reports that `done` bytes of the current piece have been read."""
        if time.monotonic() >= self._due:
            self._path.write_text(str(self._before + done))
            self._due = time.monotonic() + TICK

    def next(self, size: int) -> None:
        """Reports that the current piece of `size` bytes is finished."""
        self._before += size


@cache
def _encoder(path: Path) -> Encoder:
    return load_encoder(path)


@cache
def _evaluation(arguments: EvaluationArguments) -> Evaluation:
    return Evaluation.load(*arguments)
