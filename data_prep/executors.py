"""datatrove's executors behind one function: local processes, a SLURM cluster, or Ray.

Finished tasks are marked in the stage's log folder and skipped by every later run. datatrove's own
output goes to the log files of its tasks; the terminal shows a progress bar over the bytes read.
"""

import inspect
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from datatrove.executor.base import PipelineExecutor
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger
from tqdm import tqdm

from longctx.data_prep.work import Work
from longctx.errors import UserError

OURS = ("self", "pipeline", "tasks", "workers", "logging_dir", "depends", "skip_completed")
OURS_TOO = {"local": ("local_tasks", "local_rank_offset"), "slurm": ("depends_job_id",), "ray": ()}
POLL = 0.5  # seconds
ROOT = Path(__file__).resolve().parent.parent

logger.remove()  # importing datatrove makes it log to the terminal


@dataclass(frozen=True)
class Job:
    """Both stages, and how to run them.

    Args:
        work: the plan's folder.
        plan: content of its `plan.json`.
        tokenize: stage one, one task per unit.
        assemble: stage two, one task.
        workers: tasks that run at a time. None: one per core (local), no limit (slurm, ray).
        options: passed to datatrove's executor.
    """

    work: Work
    plan: str
    tokenize: PipelineStep
    assemble: PipelineStep
    workers: int | None
    options: dict[str, Any]


def check_options(name: str, options: dict[str, Any]) -> None:
    """Raises UserError unless executor `name` exists, is installed, and has these options."""
    if name not in OURS_TOO:
        raise UserError(f"executor={name} is not one of {', '.join(OURS_TOO)}")
    if name == "ray" and find_spec("ray") is None:
        raise UserError("executor=ray needs Ray: pip install -e '.[ray]'")
    kind: type[PipelineExecutor] = _Local if name == "local" else SlurmPipelineExecutor
    if name == "ray":
        from datatrove.executor.ray import RayPipelineExecutor

        kind = RayPipelineExecutor
    known = [x for x in inspect.signature(kind).parameters if x not in OURS + OURS_TOO[name]]
    if unknown := [key for key in options if key not in known]:
        raise UserError(
            f"executor.options.{unknown[0]} is not an option of datatrove's {name} executor, "
            f"which has {', '.join(known)}"
        )


def run(name: str, job: Job) -> str | None:
    """Runs both stages.

    Args:
        name: `local | slurm | ray`.
        job: the stages.

    Returns:
        None once the output exists; with slurm the number of the job that will make it.

    Raises:
        UserError: from the stages, or if a worker dies, a task fails, or sbatch fails.
    """
    job.work.prepare(job.plan)
    if name == "slurm":
        return _slurm(job)
    with job.work.locked():
        job.work.clean()
        if name == "ray":
            _ray(job)
        else:
            _local(job)
        _here(_executor(LocalPipelineExecutor, job.assemble, job, "assemble"), 0)
    return None


def _executor(kind: type, step: PipelineStep, job: Job, stage: str, **more: Any) -> Any:
    tasks = job.work.tasks if stage == "tokenize" else 1
    return kind(
        pipeline=[step], tasks=tasks, logging_dir=str(job.work.logs(stage)),
        skip_completed=stage == "tokenize", **more,
    )  # fmt: skip


# --- this machine ---------------------------------------------------------------------------------


class _Local(LocalPipelineExecutor):  # type: ignore[misc]
    """datatrove's executor with a pool that fails when a worker dies instead of waiting."""

    def run(self) -> None:
        """Runs the unfinished tasks; stops all of them at the first error."""
        context = multiprocessing.get_context(self.start_method)
        if self.start_method == "forkserver":  # imports once for all workers
            context.set_forkserver_preload(["longctx.data_prep.tokenize_step"])
        ranks = self.get_incomplete_ranks()
        workers = min(self.workers, len(ranks))
        if not ranks:
            return
        stopped, stop = context.Pipe(
            duplex=False
        )  # an Event would hang if a waiting process were killed
        with stopped, stop, ProcessPoolExecutor(workers, context, _watch, (stopped,)) as pool:
            try:
                futures = [pool.submit(_here, self, rank) for rank in ranks]
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
            except BrokenProcessPool as error:
                raise UserError(
                    "a worker was killed, perhaps because memory ran out (set a smaller workers=): "
                    "the same command continues after the finished tasks"
                ) from error
            except BaseException:
                stop.send_bytes(b"stop")  # never received, so every worker sees it
                raise


def _here(executor: PipelineExecutor, rank: int) -> None:
    """Runs one task in this process and keeps loguru's output off the terminal."""
    try:
        with redirect_stderr(io.StringIO()):
            executor._run_for_rank(rank, 1)
    finally:
        logger.remove()


def _watch(stopped: Connection) -> None:
    """Ends a worker when the main process asks for it or is gone, and only then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([stopped, parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _local(job: Job) -> None:
    workers = job.workers or len(os.sched_getaffinity(0))
    executor = _executor(_Local, job.tokenize, job, "tokenize", workers=workers, **job.options)
    with _progress(job.work):
        executor.run()


# --- Ray ------------------------------------------------------------------------------------------


def _ray(job: Job) -> None:
    import logging

    import ray
    from datatrove.executor.ray import RayPipelineExecutor

    logger.remove()
    if not ray.is_initialized():
        here = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": job.workers}
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **here)
    executor = _executor(
        RayPipelineExecutor, job.tokenize, job, "tokenize", workers=job.workers or -1, **job.options
    )
    try:
        if executor.get_incomplete_ranks():
            with _progress(job.work):
                executor.run()
    finally:
        ray.shutdown()
    if left := executor.get_incomplete_ranks():
        log = job.work.logs("tokenize") / "logs" / f"task_{left[0]:05d}.log"
        raise UserError(f"{len(left)} of {job.work.tasks} tasks failed, see {log}")


# --- SLURM ----------------------------------------------------------------------------------------


def _slurm(job: Job) -> str:
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        raise UserError("executor=slurm submits jobs: start it outside of an array job")
    before = job.work.submitted
    if before and _queued(before):
        raise UserError(
            f"job {before}, submitted before, is still in the queue: wait for it, or scancel it"
        )
    options = {"job_name": "longctx"} | job.options
    if not any(options.get(key) for key in ("env_command", "condaenv", "venv_path")):
        options["env_command"] = (
            f'export PATH="{Path(sys.executable).parent}:$PATH" '
            f'PYTHONPATH="{ROOT}${{PYTHONPATH:+:$PYTHONPATH}}"'
        )
    name = options.pop("job_name")
    first = _executor(
        SlurmPipelineExecutor, job.tokenize, job, "tokenize",
        workers=job.workers or -1, job_name=f"{name}-tokenize", **options,
    )  # fmt: skip
    last = _executor(
        SlurmPipelineExecutor, job.assemble, job, "assemble",
        depends=first, job_name=f"{name}-assemble", **options,
    )  # fmt: skip
    try:
        last.run()
    except FileNotFoundError as error:
        raise UserError(
            "sbatch is not installed: run this on a login node of the cluster"
        ) from error
    except subprocess.CalledProcessError as error:
        raise UserError(f"sbatch refused the job (exit code {error.returncode})") from error
    job.work.note_submitted(str(last.job_id))
    return str(last.job_id)


def _queued(number: str) -> bool:
    """Whether SLURM reports the job as waiting or running; False if squeue is missing or fails."""
    try:
        asked = subprocess.run(["squeue", "-j", number, "-h"], capture_output=True, check=False)
    except OSError:
        return False
    return asked.returncode == 0 and bool(asked.stdout.strip())


# --- the bar --------------------------------------------------------------------------------------


@contextmanager
def _progress(work: Work) -> Iterator[None]:
    """Shows a progress bar over the input's bytes while the body runs."""
    sizes = [sum(piece["stop"] - piece["start"] for piece in unit if piece["kind"] != "hf")
             for unit in work.plan["units"]]  # fmt: skip
    known = all(piece["kind"] != "hf" for unit in work.plan["units"] for piece in unit)
    over = threading.Event()
    with tqdm(
        total=sum(sizes) if known else None, initial=_done(work, sizes), unit="B", unit_scale=True,
        desc="tokenize", disable=None,
    ) as bar:  # fmt: skip

        def follow() -> None:
            while not over.wait(POLL):
                bar.update(max(0, _done(work, sizes) - bar.n))

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            bar.update(max(0, _done(work, sizes) - bar.n))


def _done(work: Work, sizes: list[int]) -> int:
    """Bytes read by finished tasks, plus those that running tasks have reported."""
    marks = work.logs("tokenize") / "completions"
    finished = {int(mark.name) for mark in marks.iterdir()} if marks.is_dir() else set()
    total = sum(sizes[rank] for rank in finished)
    for note in (work.folder / "progress").iterdir():
        try:
            total += int(note.read_text()) if int(note.name) not in finished else 0
        except (ValueError, OSError):  # being written, or just finished
            continue
    return total
