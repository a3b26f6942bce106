"""`python train.py ...` without the ten seconds of its imports, for tests.

Each run is a process of its own: a fork of a server that has imported everything once, and that
shares nothing with the tests' process (no Hydra, no process group, no monkey patch).
"""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path

from tests.helpers.process import ROOT

IMPORTED = (
    "hydra",
    "peft",
    "longctx.cli",
    "longctx.plan",
    "longctx.train.checkpoint.export_checkpoint",
    "longctx.train.trainer",
    "longctx.recipes.causal_lm",
)
LIMIT = 240  # seconds a run may take


@dataclass(frozen=True)
class Done:
    """What a finished command left.

    Args:
        code: its exit code.
        out: its standard output.
        err: its standard error.
    """

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a user's mistake gets; fails if there is more or less than that."""
        found = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert self.code == 2 and len(found) == 1, self
        assert "Traceback" not in self.err + self.out, self
        assert self.err.splitlines()[-1] == found[0], self
        return found[0].removeprefix("error: ")


def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    return context


def _child(
    arguments: list[str], log: Path, prepare: Callable[[], None] | None, script: str
) -> None:
    for name, number in (("out", 1), ("err", 2)):
        file = os.open(log.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    multiprocessing.set_start_method("fork", force=True)  # locks then leave nothing in /dev/shm
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    sys.argv = [script, *arguments]
    if prepare is not None:
        prepare()
    runpy.run_path(script, run_name="__main__")


def run_entry(
    arguments: list[str],
    log: Path,
    prepare: Callable[[], None] | None = None,
    script: str = "train.py",
) -> Done:
    """Runs an entry point to its end.

    Args:
        arguments: its command line.
        log: where its output goes, with `.out` and `.err` appended.
        prepare: called in the new process before it; a function of a module.
        script: which entry point.
    """
    process = _server().Process(target=_child, args=(arguments, log, prepare, script))
    process.start()
    process.join(LIMIT)
    if process.exitcode is None:
        process.kill()
        process.join()
    out, err = (log.with_suffix(f".{name}").read_text() for name in ("out", "err"))
    assert process.exitcode is not None
    return Done(process.exitcode, out, err)


def tree(path: Path) -> dict[str, bytes | None]:
    """Every file below `path` with its content (None: a directory); empty if there is no path."""
    return {
        str(p.relative_to(path)): None if p.is_dir() else p.read_bytes() for p in path.rglob("*")
    }
