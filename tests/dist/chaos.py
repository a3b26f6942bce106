"""A run that is killed again and again ends bit for bit as one that is left alone.

    python tests/dist/chaos.py [--kills 20] [--seed 0] [--beside] [--keep DIR]

Two ranks train a tiny model for 60 steps. A rank gets SIGKILL while they start, between two steps,
or while they save; the same command is then given again, and so on; at the end weights, moments
and metrics are compared with those of a run that nobody touched. Exit code 0: identical; 1: not.
`--beside` saves asynchronously. About half a minute a kill on two cores.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from longctx.train.checkpoint.reader import newest
from tests.helpers.process import alive, descendants, kill_tree, lines, ranks, start, torchrun
from tests.helpers.tiny import make_store, tiny_arguments

STEPS, SAVE_EVERY = 60, 2
PATIENCE = 300.0  # seconds until something must have happened
COMPARED = ("step", "tokens", "loss", "lr", "grad_norm", "skipped")


@dataclass(frozen=True)
class Kill:
    """When a rank dies.

    Args:
        moment: `start | step | save`.
        rank: which.
        delay: start: seconds after the processes are there; save: seconds after it began.
        steps: step: after so many more steps.
    """

    moment: str
    rank: int
    delay: float
    steps: int


def draw(count: int, seed: int) -> list[Kill]:
    """Kills of all kinds, at least one of each in three."""
    dice = random.Random(seed)
    moments = (["save", "step", "start"] * count)[:count]
    dice.shuffle(moments)
    longest = {"start": 8.0, "step": 0.05, "save": 0.01}
    return [
        Kill(m, dice.randrange(2), dice.uniform(0.0, longest[m]), dice.randint(1, 4))
        for m in moments
    ]


@dataclass(frozen=True)
class Trial:
    """One run of many starts.

    Args:
        arguments: its command line.
        run_dir: where it writes.
        say: takes a line of progress.
    """

    arguments: list[str]
    run_dir: Path
    say: Callable[[str], None]

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints are."""
        return self.run_dir / "checkpoints"

    def steps(self) -> int:
        """Steps whose metrics are written."""
        return len(lines(self.run_dir / "metrics.jsonl"))

    def saved(self) -> int:
        """The step that a new start goes on from; fails if a damaged checkpoint has a name."""
        found, problems = newest(self.checkpoints)
        assert not problems, problems
        return found.step if found else 0

    def run(self) -> None:
        """Starts it and lets it end."""
        process = start(torchrun(self.arguments), self.run_dir.with_suffix(".log"))
        try:
            code = process.wait(PATIENCE)
        finally:
            kill_tree(process)
        assert code == 0, self.run_dir.with_suffix(".log").read_text()[-3000:]

    def run_until(self, kill: Kill) -> str:
        """Starts it and kills a rank; what became of it."""
        before = self.saved()
        moment = "start" if before > STEPS - 3 * SAVE_EVERY else kill.moment
        process = start(torchrun(self.arguments), self.run_dir.with_suffix(".log"))
        try:
            self._wait_for(moment, before + kill.steps, process)
            time.sleep(kill.delay)
            step = self.steps()
            below = descendants(process.pid)
            os.kill(ranks(process.pid)[kill.rank], signal.SIGKILL)
            begin = time.monotonic()
            code = process.wait(PATIENCE)
            took = time.monotonic() - begin
        finally:
            kill_tree(process)
        assert code != 0, "a run with a dead rank ended well"
        assert not alive(below), "a rank outlived its launcher"
        unfinished = [path.name for path in self.checkpoints.glob("*.tmp")]
        left = f", {unfinished[0]} left" if unfinished else ""
        return (
            f"rank {kill.rank} killed at {moment} {f'{step}' if step else ''} after going on from "
            f"{before}; all had ended {took:.1f} s later{left}; newest whole: {self.saved()}"
        )

    def _wait_for(self, moment: str, step: int, process: subprocess.Popen) -> None:
        reached = {
            "start": lambda: len(ranks(process.pid)) == 2,
            "step": lambda: len(ranks(process.pid)) == 2 and self.steps() == step,
            "save": lambda: any(self.checkpoints.glob("*.tmp")),
        }[moment]
        if moment != "start":  # metrics and leftovers of the start before are gone once it trains
            self._wait(lambda: len(ranks(process.pid)) == 2, process)
            self._wait(self._trains(process), process)
        self._wait(reached, process)

    def _trains(self, process: subprocess.Popen) -> Callable[[], bool]:
        log = self.run_dir.with_suffix(".log")
        return lambda: b"step/s" in log.read_bytes() or b"s/step" in log.read_bytes()

    def _wait(self, what: Callable[[], bool], process: subprocess.Popen) -> None:
        limit = time.monotonic() + PATIENCE
        while not what():
            assert process.poll() is None, self.run_dir.with_suffix(".log").read_text()[-3000:]
            assert time.monotonic() < limit, "timed out"
            time.sleep(0.001)

    def outcome(self) -> tuple[list[list[float]], dict[str, bytes]]:
        """The metrics and the last checkpoint's weights and moments."""
        found = [json.loads(line) for line in lines(self.run_dir / "metrics.jsonl")]
        last = self.checkpoints / f"step_{STEPS:08d}"
        files = {path.name: path.read_bytes() for path in last.glob("*.safetensors")}
        assert len(found) == STEPS and len(files) == 2
        return [[m[key] for key in COMPARED] for m in found], files


def chaos(out: Path, kills: list[Kill], beside: bool, say: Callable[[str], None]) -> bool:
    """Whether a run that is killed ends as one that is not.

    Args:
        out: an empty directory.
        kills: in this order.
        beside: save asynchronously.
        say: takes a line of progress.
    """
    store = make_store(out / "store")
    more = (
        f"train.max_steps={STEPS}",
        f"train.save_every={SAVE_EVERY}",
        "train.keep_last=2",
        f"train.save_async={str(beside).lower()}",
        "parallel.zero_stage=2",
        "parallel.lost_after=10",
    )
    calm, killed = (
        Trial(tiny_arguments(store, out / name, *more), out / name, say)
        for name in ("calm", "killed")
    )
    calm.run()
    say("the undisturbed run is there")
    for number, kill in enumerate(kills, 1):
        say(f"{number}/{len(kills)}: {killed.run_until(kill)}")
    killed.run()
    same_metrics, same_state = (
        a == b for a, b in zip(calm.outcome(), killed.outcome(), strict=True)
    )
    if not same_metrics or not same_state:
        say(f"metrics alike: {same_metrics}; weights and moments alike: {same_state}")
    return same_metrics and same_state


def main() -> None:
    """Runs it, with one line as the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--beside", action="store_true", help="save asynchronously")
    parser.add_argument("--keep", type=Path, help="an empty directory, to look into afterwards")
    options = parser.parse_args()
    begin = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - begin:6.0f} s  {line}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        out = options.keep or Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        same = chaos(out, draw(options.kills, options.seed), options.beside, say)
    verdict = "bit-identical to" if same else "NOT that of"
    how = "asynchronous" if options.beside else "synchronous"
    say(
        f"{options.kills} kills, {how} saving, seed {options.seed}: the end state is {verdict} an "
        "undisturbed run"
    )
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
