"""The work folder: tokenised shards, reused by later runs with the same input and tokenizer.

`WORK/<hash>/` holds `plan.json` (the units and everything else that determines the content of
their shards; the folder is named by its hash), `shards/`, datatrove's `logs/` with a mark for each
finished task, and `progress/`. The plan does not depend on the number of workers, the executor, or
any rule that is applied to finished shards.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from longctx.data_prep.inputs import Piece
from longctx.errors import UserError

PLAN, SUBMITTED, REPORT = "plan.json", "submitted", "report.json"
FORMAT = 2  # version of the shards; older ones are not reused


@dataclass(frozen=True)
class Work:
    """One plan's folder.

    Args:
        folder: `WORK/<hash>`.
    """

    folder: Path

    @classmethod
    def of(cls, root: Path, plan: str) -> "Work":
        """The folder in `root` that belongs to a plan; writes nothing."""
        return cls(root / hashlib.sha256(plan.encode()).hexdigest()[:16])

    def prepare(self, plan: str) -> None:
        """Creates the folder, or prepares an existing one for another run."""
        for name in ("shards", "logs", "progress"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        if not (self.folder / PLAN).is_file():
            write_atomically(self.folder / PLAN, plan)

    def clean(self) -> None:
        """Removes the leftovers of interrupted tasks; call it only while holding the lock."""
        for leftover in (self.folder / "shards").glob("*.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for note in (self.folder / "progress").iterdir():
            note.unlink(missing_ok=True)

    @property
    def plan(self) -> dict[str, Any]:
        """The content of `plan.json`."""
        return _plan(self.folder)

    def unit(self, rank: int) -> list[Piece]:
        """The pieces that task `rank` reads."""
        return [Piece(**piece) for piece in self.plan["units"][rank]]

    @property
    def tasks(self) -> int:
        """The number of units."""
        return len(self.plan["units"])

    def shard(self, rank: int) -> Path:
        """The folder of the shard of task `rank`."""
        return self.folder / "shards" / f"{rank:05d}"

    def finished(self, rank: int) -> bool:
        """Whether the shard of task `rank` exists; it appears only when it is complete."""
        return (self.shard(rank) / REPORT).is_file()

    def progress(self, rank: int) -> Path:
        """The file in which running task `rank` writes how many bytes it has read."""
        return self.folder / "progress" / f"{rank:05d}"

    def logs(self, stage: str) -> Path:
        """The folder of datatrove's logs and completion marks for a stage."""
        return self.folder / "logs" / stage

    def forget(self, rank: int) -> None:
        """Makes task `rank` run again: deletes its shard and its completion mark."""
        shutil.rmtree(self.shard(rank), ignore_errors=True)
        (self.logs("tokenize") / "completions" / f"{rank:05d}").unlink(missing_ok=True)

    @property
    def submitted(self) -> str | None:
        """The number of the last SLURM job that was submitted, or None."""
        file = self.folder / SUBMITTED
        return file.read_text("utf-8") if file.is_file() else None

    def note_submitted(self, number: str) -> None:
        """Stores the number of a SLURM job."""
        write_atomically(self.folder / SUBMITTED, number)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the folder against other runs.

        Raises:
            UserError: if another run holds the lock.
        """
        with (self.folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another run is using {self.folder}: wait until it ends") from None
            yield


def plan_text(units: list[list[Piece]], deciding: dict[str, Any]) -> str:
    """The content of `plan.json`.

    Args:
        units: the pieces that each task reads.
        deciding: everything else that determines the content of a shard, JSON-able.
    """
    parts = [[asdict(piece) for piece in unit] for unit in units]
    return json.dumps({"format": FORMAT, "deciding": deciding, "units": parts}, sort_keys=True)


@cache
def _plan(folder: Path) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((folder / PLAN).read_text("utf-8"))
    return plan


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file atomically: other processes see all of it or nothing."""
    part = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
