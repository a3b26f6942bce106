"""Runs that other runs start from: `longctx train recipe=cepe chain=true`.

A choice says beside a path which run makes what is there (`made_by`). What is missing is trained
first, each stage as a run of its own under the sweep's launcher: a process joins one process group.
The same command goes on where it was ended, since what is there is not made again.
"""

import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from hydra_plugins.longctx_jobs import _jobs as jobs
from longctx.cli import places
from longctx.cli.arguments import SWEEP
from longctx.cli.families import EXPORT
from longctx.cli.numbers import keys
from longctx.cli.start import compose
from longctx.config import RunConfig
from longctx.errors import UserError
from longctx.parallel.slurm import ranks

FLAG, LAUNCH = "chain", "hydra.launcher."
# What all stages share: the decoder, where data are, and how runs are started and logged.
SHARED = {"model", "family", "attention", "rope", "parallel", "logger", "wandb", "seed", "force"}
SHARED_KEYS = {"data", "data.store", "data.held_out", "data.weights", "train.dtype"}
DECODER = {"model", "family", "attention", "rope"}  # but not where a stage has a model of its own


@dataclass(frozen=True)
class Stage:
    """A run of the chain.

    Args:
        arguments: of `longctx train`.
        makes: the export that the next one reads; None: the run that was asked for.
    """

    arguments: list[str]
    makes: str | None = None

    @property
    def recipe(self) -> str:
        """The recipe's name."""
        return next(a.partition("=")[2] for a in self.arguments if a.startswith("recipe="))


def take_flag(arguments: list[str]) -> bool:
    """Takes `chain=` off the command line.

    Args:
        arguments: of the command line; changed.

    Raises:
        UserError: if it is neither true nor false.
    """
    given = [a for a in arguments if a.startswith(f"{FLAG}=")]
    for argument in given:
        arguments.remove(argument)
    value = given[-1].partition("=")[2].lower() if given else "false"
    if value not in ("true", "false"):
        raise UserError(f"{FLAG}={value} is neither true nor false")
    return value == "true"


def stages(arguments: Sequence[str]) -> list[Stage]:
    """What is missing before a run, in the order in which it has to be made, and that run.

    Args:
        arguments: of `longctx train`, without the flag.

    Raises:
        UserError: if a sweep or several ranks are asked for, or a setting is wrong.
    """
    if "RANK" in os.environ or ranks(os.environ):
        raise UserError(
            f"{FLAG}=true starts the processes of its stages itself: longctx train recipe=NAME "
            f"{FLAG}=true {LAUNCH}nproc=N, without torchrun or deepspeed before it"
        )
    if SWEEP.intersection(arguments):
        raise UserError(f"{FLAG}=true is for one run: train the stages first, then sweep (-m)")
    asked = [a for a in arguments if not a.startswith(LAUNCH)]
    return [*_missing(asked, set()), Stage(asked)]


def _missing(arguments: list[str], known: set[str]) -> list[Stage]:
    """The stages before a run, deepest first; `known` paths are in the chain already."""
    run, found = compose(arguments, RunConfig, "train", "run_schema"), list[Stage]()
    for key, (path, made_by) in run.made_before().items():
        if path in known or is_there(path):
            continue
        if Path(path).name != EXPORT:
            raise UserError(f"{key}={path} is not there; {made_by} exports to RUN/{EXPORT}")
        known.add(path)
        place = str(Path(path).parent).replace("\\", "\\\\").replace("'", "\\'")
        stage = [*made_by.split(), *_shared(arguments, made_by), f"run_dir='{place}'"]
        found += [*_missing(stage, known), Stage(stage, path)]
    return found


def _shared(arguments: Sequence[str], made_by: str) -> list[str]:
    """The arguments of a run that hold for a stage too."""
    roots = SHARED - DECODER if "model" in keys(made_by.split()) else SHARED
    kept, folders = places.split(arguments)
    named = ((a, a.lstrip("+~").partition("=")[0]) for a in kept)
    return [
        *places.flags(folders),
        *(a for a, key in named if key in SHARED_KEYS or key.split(".")[0] in roots),
    ]


def is_there(path: str) -> bool:
    """Whether a path exists, or is a name on the hub."""
    hub = path.count("/") == 1 and not path.startswith((".", "/")) and Path(path).name != EXPORT
    return Path(path).exists() or hub


def require_made(run: RunConfig) -> None:
    """Refuses a run that starts from what is missing; inside a command that Hydra has started.

    A dry run needs the model's shapes alone, and those may stand in its YAML.

    Raises:
        UserError: it says what makes it, and the flag that trains all that is missing.
    """
    missing = [x for x in run.made_before().items() if not is_there(x[1][0])]
    if run.dry_run:
        missing = [x for x in missing if x[0] == "model.path" and not run.model.architecture]
    if not missing:
        return
    key, (path, made_by) = missing[0]
    line = f"{key}={path} is not there: {made_by} makes it"
    if Path(path).name == EXPORT:
        given = [*places.flags(places.ADDED), *HydraConfig.get().overrides.task]
        GlobalHydra.instance().clear()  # the run ends here; its stages are composed instead
        before = _missing(given, set())
        names = ", ".join(stage.recipe for stage in before)
        line += f". {FLAG}=true trains what is missing first, in this order: {names}"
    raise UserError(line)


def train(chain: Sequence[Stage], launch: Sequence[str]) -> None:
    """Trains the stages one after another, printing what they print; a dry run prints commands.

    Ends the process with the exit code of a stage that fails.

    Args:
        chain: the stages.
        launch: arguments of the command line, of which `hydra.launcher.kind` and `.nproc` count.
    """
    given = dict(a.split("=", 1) for a in launch if a.startswith(LAUNCH) and "=" in a)
    kind, nproc = given.get(f"{LAUNCH}kind", "torchrun"), given.get(f"{LAUNCH}nproc")
    if nproc is not None and not nproc.isdecimal():
        raise UserError(f"{LAUNCH}nproc={nproc} is not a number of processes")
    cores = len(os.sched_getaffinity(0))
    share = jobs.shares(kind, None if nproc is None else int(nproc), 1, jobs.devices(), cores)[0]
    for number, stage in enumerate(chain, 1):
        print(f"[{number}/{len(chain)}] longctx train {shlex.join(stage.arguments)}", flush=True)
        if "dry_run=true" in launch:
            continue
        program = jobs.program(sys.argv[0])
        start = jobs.command(kind, share, jobs.free_port(), program, stage.arguments)
        with jobs.ends_by_exception():
            job = jobs.Job(start, jobs.environment(kind, share, os.environ), None)
            try:
                while (code := job.code()) is None:
                    time.sleep(0.05)
                job.signal(signal.SIGKILL)  # what a dead launcher may have left
            finally:
                if job.alive():
                    jobs.stop([job])
        if code:
            sys.exit(code)
