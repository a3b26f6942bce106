"""The work folder: tokenised shards that later runs with the same input and tokenizer reuse.

`WORK/<hash>/` holds `plan.json` (units, and all that decides what their shards contain: the hash
is over it), `shards/`, datatrove's `logs/` with a mark for each finished task, and `progress/`.
Number of workers, executor and everything that is applied to finished shards are not part of it.
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
FORMAT = 2  # of the shards; a change makes all old ones unused


@dataclass(frozen=True)
class Work:
    """One plan's folder.

    Args:
        folder: `WORK/<hash>`.
    """

    folder: Path

    @classmethod
    def of(cls, root: Path, plan: str) -> "Work":
        """The folder in `root` that belongs to a plan; nothing is written."""
        return cls(root / hashlib.sha256(plan.encode()).hexdigest()[:16])

    def prepare(self, plan: str) -> None:
        """Makes the folder, or makes it fit for another run."""
        for name in ("shards", "logs", "progress"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        if not (self.folder / PLAN).is_file():
            write_atomically(self.folder / PLAN, plan)

    def clean(self) -> None:
        """Removes what interrupted tasks left; no other run may be at work."""
        for leftover in (self.folder / "shards").glob("*.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for note in (self.folder / "progress").iterdir():
            note.unlink(missing_ok=True)

    @property
    def plan(self) -> dict[str, Any]:
        """The content of `plan.json`."""
        return _plan(self.folder)

    def unit(self, rank: int) -> list[Piece]:
        """What task `rank` reads."""
        return [Piece(**piece) for piece in self.plan["units"][rank]]

    @property
    def tasks(self) -> int:
        """How many units there are."""
        return len(self.plan["units"])

    def shard(self, rank: int) -> Path:
        """Where task `rank` leaves what it made."""
        return self.folder / "shards" / f"{rank:05d}"

    def finished(self, rank: int) -> bool:
        """Whether the shard of task `rank` is there; it appears when it is complete."""
        return (self.shard(rank) / REPORT).is_file()

    def progress(self, rank: int) -> Path:
        """Where task `rank` notes how many bytes it has read, while it runs."""
        return self.folder / "progress" / f"{rank:05d}"

    def logs(self, stage: str) -> Path:
        """Where datatrove keeps logs and marks of a stage's tasks."""
        return self.folder / "logs" / stage

    def forget(self, rank: int) -> None:
        """Lets task `rank` run again; its shard goes, or else the task would keep it."""
        shutil.rmtree(self.shard(rank), ignore_errors=True)
        (self.logs("tokenize") / "completions" / f"{rank:05d}").unlink(missing_ok=True)

    @property
    def submitted(self) -> str | None:
        """The number of the SLURM job that was submitted last."""
        file = self.folder / SUBMITTED
        return file.read_text("utf-8") if file.is_file() else None

    def note_submitted(self, number: str) -> None:
        """Keeps the number of a SLURM job."""
        write_atomically(self.folder / SUBMITTED, number)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other runs out.

        Raises:
            UserError: if one is in.
        """
        with (self.folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another run is at work in {self.folder}: wait for it") from None
            yield


def plan_text(units: list[list[Piece]], deciding: dict[str, Any]) -> str:
    """The content of `plan.json`.

    Args:
        units: what each task reads.
        deciding: everything else that decides what a shard contains, JSON-able.
    """
    parts = [[asdict(piece) for piece in unit] for unit in units]
    return json.dumps({"format": FORMAT, "deciding": deciding, "units": parts}, sort_keys=True)


@cache
def _plan(folder: Path) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((folder / PLAN).read_text("utf-8"))
    return plan


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file that others see whole or not at all."""
    part = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
