"""The table over a sweep: one row a point, read from the run directories.

Written again whenever a point starts or ends, so a sweep that was killed leaves the truth behind.
"""

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

WAITING, RUNNING, STOPPED = "waiting", "running", "stopped"
DONE, BEFORE, FAILED = "done", "done before", "failed"


@dataclass
class Row:
    """One point.

    Args:
        overrides: what the sweep varies, with this point's values.
        directory: its run directory.
        status: `waiting | running | done | done before | failed | stopped`.
        held_out_loss: the last one; None without held-out data.
        loss: training loss of the last step.
        step: the last one.
        seconds: wall time of the job, its start included.
        reason: why it failed.
    """

    overrides: dict[str, str]
    directory: str
    status: str = WAITING
    held_out_loss: float | None = None
    loss: float | None = None
    step: int | None = None
    seconds: float | None = None
    reason: str = ""

    def read_metrics(self) -> None:
        """Takes the losses from the run directory."""
        from longctx.train.log import held_out_loss, read_metrics

        lines = read_metrics(Path(self.directory))
        if lines:
            self.step, self.loss = lines[-1]["step"], lines[-1]["loss"]
        self.held_out_loss = held_out_loss(Path(self.directory))

    def words(self) -> str:
        """The row in one line, for the terminal while the sweep runs."""
        what = " ".join(f"{key}={value}" for key, value in self.overrides.items())
        parts = [f"{what or self.directory}: {self.status}"]
        if self.held_out_loss is not None:
            parts.append(f"held-out loss {self.held_out_loss:.4f}")
        if self.seconds is not None:
            parts.append(f"{self.seconds:.0f} s")
        return ", ".join(parts) + (f"; {self.reason}" if self.reason else "")


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, then why points failed."""
    keys = list(dict.fromkeys(key for row in rows for key in row.overrides))
    best = min((r.held_out_loss for r in rows if r.held_out_loss is not None), default=None)
    head = [*keys, "status", "held-out loss", "loss", "step", "seconds", "directory"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        held_out = _number(row.held_out_loss, ".4f")
        lines.append([
            *(row.overrides.get(key, "") for key in keys),
            row.status,
            f"**{held_out}**" if best is not None and row.held_out_loss == best else held_out,
            _number(row.loss, ".4f"),
            _number(row.step, "d"),
            _number(row.seconds, ".0f"),
            row.directory,
        ])  # fmt: skip
    table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in x) + " |" for x in lines]
    reasons = [f"- {row.directory}: {row.reason}" for row in rows if row.reason]
    return "\n".join([*table, *([""] if reasons else []), *reasons]) + "\n"


def write(directory: Path, rows: Sequence[Row]) -> None:
    """Writes `sweep.md` and `sweep.json`; a reader never sees half of one."""
    texts = {
        "sweep.md": markdown(rows),
        "sweep.json": json.dumps([asdict(row) for row in rows], indent=1) + "\n",
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        partial = directory / f"{name}.tmp"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, directory / name)  # noqa: PTH105 - Path.replace names no target first


def reason(code: int, log: str) -> str:
    """Why a job failed, in one line.

    Args:
        code: its exit code, negative for a signal.
        log: its output.
    """
    lines = [line.strip() for line in log.splitlines()]
    ours = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if ours:
        return ours[-1]
    raised = [line for line in lines if _names_an_exception(line)]
    if raised:
        return raised[0]
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _names_an_exception(line: str) -> bool:
    """Whether `line` is the last one of a traceback: `package.SomeError: what`."""
    name = line.partition(":")[0]
    return name.replace(".", "").isidentifier() and name.endswith(("Error", "Exception"))


def _number(value: float | None, style: str) -> str:
    return "" if value is None else format(value, style)
