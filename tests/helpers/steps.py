"""Pipeline steps that misbehave, importable in worker processes."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep

from longctx.errors import UserError


class Step(PipelineStep):  # type: ignore[misc]
    """Leaves a file per rank, after doing as told.

    Args:
        folder: where the files go.
        deed: of rank 1 `kill | refuse`; of rank 0 `meet`: it waits until rank 1 runs beside it.
    """

    name = "test"
    type = "test"

    def __init__(self, folder: Path, deed: str = "none") -> None:
        super().__init__()
        self.folder = folder
        self.deed = deed

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Does what it was told."""
        if rank == 1 and self.deed == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1 and self.deed == "refuse":
            raise UserError("rank 1 does not want to")
        end = time.monotonic() + 60
        while rank == 0 and self.deed == "meet" and not (self.folder / "1").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        (self.folder / f"{rank}").write_text(str(os.getpid()))
