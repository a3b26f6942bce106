"""What a run reports: a progress bar, one JSON line a step, and wandb if asked for.

`metrics.jsonl` is always written. On resume its lines after the resumed step are dropped, so a run
that was killed leaves the same lines as one that was not. While the disk is full, lines wait in
memory.
"""

import errno
import json
import math
import netrc
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from longctx.config import WandbConfig
from longctx.errors import UserError

METRICS = "metrics.jsonl"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def say(line: str) -> None:
    """Prints a line on stderr, above the progress bar."""
    tqdm.write(line, file=sys.stderr)


class Log:
    """The metrics of one run, on the rank that writes.

    Args:
        run_dir: where `metrics.jsonl` is.
        config: the resolved run, for wandb.
        first_step: steps already done; later lines are dropped.
        max_steps: length of the progress bar.
        wandb: None, or where wandb files the run.
    """

    def __init__(
        self,
        run_dir: Path,
        config: dict[str, Any],
        first_step: int,
        max_steps: int,
        wandb: WandbConfig | None,
    ) -> None:
        path = run_dir / METRICS
        kept = [x for x in read_metrics(run_dir) if x["step"] <= first_step]
        partial = path.with_suffix(".tmp")
        partial.write_text("".join(json.dumps(x) + "\n" for x in kept))
        partial.rename(path)
        self._file = path.open("ab", buffering=0)
        self._waiting = b""  # for room on the disk
        self._bar = tqdm(
            total=max_steps, initial=first_step, unit="step", desc=config["name"], smoothing=0.1
        )
        self._wandb = _start_wandb(run_dir, config, wandb) if wandb else None

    def step(self, metrics: Mapping[str, float | int | None]) -> None:
        """One optimizer step; `metrics` must hold `step` and `loss`. JSON has no NaN: null."""
        line = {k: v if v is None or math.isfinite(v) else None for k, v in metrics.items()}
        self._write(json.dumps(line).encode() + b"\n")
        shown = {
            k: v for k, v in metrics.items() if k in ("loss", "eval_loss", "tokens_per_second")
        }
        self._bar.set_postfix({k: f"{v:.4g}" for k, v in shown.items() if v is not None})
        self._bar.update(1)
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in metrics.items() if v is not None})

    def _write(self, more: bytes) -> None:
        waited = bool(self._waiting)
        self._waiting += more
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            if not waited:
                say(f"warning: {METRICS} cannot be written: {error}; its lines wait in memory")

    def close(self) -> None:
        """Flushes everything."""
        self._write(b"")
        self._file.close()
        self._bar.close()
        if self._wandb is not None:
            self._wandb.finish()


def write_config(run_dir: Path, config: dict[str, Any]) -> None:
    """Writes the resolved run into its directory, as `config.yaml`.

    Raises:
        UserError: if `run_dir` cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        partial = run_dir / "config.yaml.tmp"
        partial.write_text(yaml.safe_dump(config, sort_keys=False))
        partial.rename(run_dir / "config.yaml")
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"run_dir={run_dir} cannot be written: {reason}") from error


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics; a half-written last line is left out."""
    path = run_dir / METRICS
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def held_out_loss(run_dir: Path) -> float | None:
    """The last held-out loss of a run; None if there is none."""
    found = [line["eval_loss"] for line in read_metrics(run_dir) if "eval_loss" in line]
    return float("nan" if found[-1] is None else found[-1]) if found else None


def _start_wandb(run_dir: Path, config: dict[str, Any], settings: WandbConfig) -> Any:
    import wandb

    mode: Any = settings.mode
    if mode == "auto":
        mode = "online" if _has_wandb_key() else "offline"
    return wandb.init(
        project=settings.project,
        entity=settings.entity,
        name=run_dir.name,
        dir=str(run_dir),
        config=config,
        mode=mode,
        resume="allow",
        id="".join(c if c.isalnum() else "-" for c in str(run_dir))[-64:],
    )


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return "api.wandb.ai" in netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
