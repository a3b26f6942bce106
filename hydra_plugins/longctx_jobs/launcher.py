"""Hydra's launcher for sweeps: `python train.py -m recipe=pi,direct_ft` starts one job per point.

Nothing of a run happens in this process. A point's directory is a function of the command, so the
same command again goes on: finished points are left as they are, others resume. Hydra runs this
file at every start, a second time if it was imported before; those beside it begin with _, which
it leaves alone.
"""

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from hydra_plugins.longctx_jobs import _jobs as jobs
from hydra_plugins.longctx_jobs import _table as table
from hydra_plugins.longctx_jobs._table import Row
from longctx.errors import UserError

RECORD = "sweep_point.json"  # in the run directory of a finished point


@dataclass
class JobsConf:
    """`hydra.launcher.*`.

    Args:
        kind: `torchrun | deepspeed | python`, what starts a job's processes.
        nproc: processes per job. None: as many as its part of the GPUs, on CPU one.
        parallel: jobs at a time; they divide this machine's GPUs and cores.
    """

    _target_: str = "hydra_plugins.longctx_jobs.launcher.JobsLauncher"
    kind: str = "torchrun"
    nproc: int | None = None
    parallel: int = 1


ConfigStore.instance().store("jobs", JobsConf, group="hydra/launcher", provider="longctx")


@dataclass
class Point:
    """A point of the sweep and what came of it.

    Args:
        overrides: all of them.
        config: its configuration, Hydra's own part included.
        identity: digest of the run's configuration; empty: unknown, never taken as finished.
        row: of the table.
    """

    overrides: list[str]
    config: DictConfig
    identity: str
    row: Row

    @property
    def folder(self) -> Path:
        """The run directory."""
        return Path(self.row.directory)

    def finished(self) -> bool:
        """Whether an earlier sweep ran this very point to its end; then takes its numbers."""
        try:
            record: dict[str, Any] = json.loads((self.folder / RECORD).read_text("utf-8"))
        except (OSError, ValueError):
            return False
        if not self.identity or record.get("identity") != self.identity:
            return False
        self.row.status, self.row.seconds = table.BEFORE, record.get("seconds")
        self.row.read_metrics()
        return True

    def ended(self, code: int, seconds: float, log: str, stopped: bool) -> None:
        """Takes the outcome of its job.

        Args:
            code: exit code.
            seconds: wall time.
            log: what it printed.
            stopped: whether this sweep ended it.
        """
        self.row.seconds = seconds
        self.row.read_metrics()
        if code and stopped:
            self.row.status = table.STOPPED
            return
        if code:
            self.row.status, self.row.reason = table.FAILED, table.reason(code, log)
            return
        self.row.status = table.DONE
        partial = self.folder / f"{RECORD}.tmp"
        record = {"identity": self.identity, "overrides": self.overrides, "seconds": seconds}
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.folder / RECORD)


class Outcome(JobReturn):
    """What a sweeper asks for: the objective, or an exception that says where to look."""

    @property
    def return_value(self) -> Any:
        """The last held-out loss; raises for a failed point."""
        if self.status != JobStatus.COMPLETED:
            raise self._return_value
        return self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        """Keeps the objective, or the exception."""
        self._return_value = value


class JobsLauncher(Launcher):
    """Starts the points of a sweep as jobs of their own; see `JobsConf` for the arguments."""

    def __init__(self, kind: str, nproc: int | None, parallel: int) -> None:
        self.kind = kind
        cores = len(os.sched_getaffinity(0))
        self.shares = jobs.shares(kind, nproc, parallel, jobs.devices(), cores)
        self.rows: list[Row] = []

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Hydra's side; the task is not called here but by each job's own `train.py`."""
        self.context, self.config = hydra_context, config
        self.folder = Path(str(config.hydra.sweep.dir))

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Runs a batch of points and prints the table."""
        setup_globals()
        points: list[Point] = []
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            point = self._point(number, overrides)
            if point.row.directory in {other.row.directory for other in points}:
                point.row.directory += f"-{number}"  # the same point twice at a time
            points.append(point)
        self.rows += [point.row for point in points]
        self._write()
        with jobs.ends_by_exception():
            self._run([point for point in points if not self._finished(point)])
        print(table.markdown(self.rows), flush=True)
        print(f"{self.folder}/sweep.md, sweep.json", flush=True)
        failed = sum(row.status == table.FAILED for row in self.rows)
        error = UserError(
            f"{failed} of {len(self.rows)} points failed, see {self.folder}/sweep.md; "
            "the same command tries those again"
        )
        return [_outcome(point, error) for point in points]

    def _point(self, number: int, overrides: Sequence[str]) -> Point:
        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        HydraConfig.instance().set_config(config)  # for interpolations of hydra:
        fixed = set(config.hydra.job.config.override_dirname.exclude_keys)
        swept = {
            x.key_or_group: x.get_value_element_as_str()
            for x in OverridesParser.create().parse_overrides(list(overrides))
            if x.key_or_group not in fixed
        }
        folder = str(self.folder / str(config.hydra.sweep.subdir))
        return Point(list(overrides), config, _identity(config), Row(swept, folder))

    def _finished(self, point: Point) -> bool:
        if point.config.get("resume", "auto") != "auto" or not point.finished():
            return False
        self._say(point)
        return True

    def _run(self, points: list[Point]) -> None:
        """Runs `points`, as many at a time as there are shares."""
        waiting, running = list(reversed(points)), dict[int, tuple[Point, jobs.Job, int]]()
        try:
            while waiting or running:
                for slot in range(len(self.shares)):
                    if slot not in running and waiting:
                        running[slot] = self._start(waiting.pop(), slot)
                for slot, (point, job, offset) in list(running.items()):
                    if (code := job.code()) is not None:
                        del running[slot]
                        job.signal(signal.SIGKILL)  # what a dead launcher may have left
                        self._end(point, job, code, offset)
                time.sleep(0.05)
        finally:
            if running:
                print("stopping: jobs save and end", file=sys.stderr, flush=True)
                jobs.stop(job for _, job, _ in running.values())
                for point, job, offset in running.values():
                    self._end(point, job, job.wait(), offset, stopped=True)

    def _start(self, point: Point, slot: int) -> tuple[Point, jobs.Job, int]:
        point.folder.mkdir(parents=True, exist_ok=True)
        log = point.folder / "launch.log"
        offset = log.stat().st_size if log.exists() else 0
        place = point.row.directory.replace("\\", "\\\\").replace("'", "\\'")
        arguments = [*_folders(self.config), *point.overrides, f"run_dir='{place}'"]
        share, program = self.shares[slot], jobs.program(sys.argv[0])
        start = jobs.command(self.kind, share, jobs.free_port(), program, arguments)
        job = jobs.Job(start, jobs.environment(self.kind, share, os.environ), log)
        point.row.status = table.RUNNING
        self._say(point)
        return point, job, offset

    def _end(
        self, point: Point, job: jobs.Job, code: int, offset: int, stopped: bool = False
    ) -> None:
        with (point.folder / "launch.log").open("rb") as log:
            log.seek(offset)
            printed = log.read().decode(errors="replace")
        point.ended(code, job.seconds, printed, stopped)
        self._say(point)

    def _say(self, point: Point) -> None:
        self._write()
        number = next(i for i, row in enumerate(self.rows, 1) if row is point.row)
        print(f"[{number}/{len(self.rows)}] {point.row.words()}", file=sys.stderr, flush=True)

    def _write(self) -> None:
        table.write(self.folder, self.rows)


def _folders(config: DictConfig) -> list[str]:
    """`--config-dir` of the sweep's own command line."""
    added = config.hydra.get("searchpath") or []
    return [x for path in added for x in ("--config-dir", str(path).removeprefix("file://"))]


def _identity(config: DictConfig) -> str:
    """A digest of everything the run is told, with interpolations resolved."""
    told = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    plain = OmegaConf.to_container(told, resolve=True)
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _outcome(point: Point, error: UserError) -> Outcome:
    outcome = Outcome(overrides=point.overrides, cfg=point.config, working_dir=str(Path.cwd()))
    failed = point.row.status == table.FAILED
    outcome.status = JobStatus.FAILED if failed else JobStatus.COMPLETED
    outcome.return_value = error if failed else point.row.held_out_loss
    return outcome
