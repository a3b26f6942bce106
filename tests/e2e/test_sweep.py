"""`python train.py -m ...`: a job per point, a table at the end, and no process left behind."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.helpers.entry import run_entry
from tests.helpers.process import alive, descendants, kill_tree, lines, start, wait_until
from tests.helpers.tiny import make_store, tiny_arguments


def sweep(store: Path, folder: Path, *more: str) -> list[str]:
    """The command of a sweep over tiny runs."""
    arguments = [x for x in tiny_arguments(store, folder) if not x.startswith("run_dir=")]
    return [sys.executable, "train.py", "-m", *arguments, f"hydra.sweep.dir={folder}", *more]


def done(command: list[str], log: Path) -> tuple[int, str]:
    process = start(command, log)
    try:
        code = process.wait(300)
    finally:
        kill_tree(process)
    return code, log.read_text()


def table(folder: Path) -> dict[str, dict]:
    return {
        Path(row["directory"]).name: row for row in json.loads((folder / "sweep.json").read_text())
    }


def test_a_sweep_goes_on_after_a_failed_point_and_is_not_computed_twice(tmp_path):
    store, folder = make_store(tmp_path / "store"), tmp_path / "my sweep"
    points = ("optim.lr=1e-2,-1,1e-3", "train.max_steps=3", "hydra.launcher.kind=python")
    command = sweep(store, folder, *points, "hydra.launcher.parallel=2")
    command[command.index("recipe=pretrain")] = "recipe=choice(pretrain)"  # as in -m recipe=a,b
    code, said = done(command, tmp_path / "log")
    assert code == 2, said
    rows = table(folder)
    assert [row["status"] for row in rows.values()] == ["done", "failed", "done"]
    assert rows["optim.lr--1+recipe-pretrain"]["reason"] == "optim.lr=-1.0 must be above 0"
    assert (
        rows["optim.lr-0.01+recipe-pretrain"]["held_out_loss"]
        < rows["optim.lr-0.001+recipe-pretrain"]["held_out_loss"]
    )
    for row in (rows["optim.lr-0.01+recipe-pretrain"], rows["optim.lr-0.001+recipe-pretrain"]):
        metrics = [json.loads(x) for x in lines(Path(row["directory"]) / "metrics.jsonl")]
        assert [m["step"] for m in metrics] == [1, 2, 3] and row["step"] == 3
        assert (row["loss"], row["held_out_loss"]) == (
            metrics[-1]["loss"],
            metrics[-1]["eval_loss"],
        )
        assert (Path(row["directory"]) / "hf" / "model.safetensors").exists()
        lr = Path(row["directory"]).name.removeprefix("optim.lr-").removesuffix("+recipe-pretrain")
        assert row["overrides"] == {"recipe": "pretrain", "optim.lr": lr}
    assert (folder / "sweep.md").read_text() in said
    assert said.splitlines()[-1] == (
        f"error: 1 of 3 points failed, see {folder}/sweep.md; the same command tries those again"
    )

    logs = {path: path.read_bytes() for path in folder.glob("*/launch.log")}
    code, said = done(command, tmp_path / "log")
    again = table(folder)
    assert [row["status"] for row in again.values()] == ["done before", "failed", "done before"]
    changed = [path.parent.name for path, was in logs.items() if path.read_bytes() != was]
    assert len(logs) == 3 and changed == ["optim.lr--1+recipe-pretrain"]
    numbers = ("held_out_loss", "loss", "step", "seconds")
    for name in ("optim.lr-0.01+recipe-pretrain", "optim.lr-0.001+recipe-pretrain"):
        assert [again[name][x] for x in numbers] == [rows[name][x] for x in numbers]


@pytest.mark.dist
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_sweep_leaves_no_process_and_goes_on(number, tmp_path):
    store, folder = make_store(tmp_path / "store"), tmp_path / "sweep"
    jobs = ("seed=5,6", "hydra.launcher.kind=torchrun", "hydra.launcher.nproc=2")
    driver = start(sweep(store, folder, *jobs, "train.max_steps=1000000"), tmp_path / "log")
    metrics = folder / "seed-5" / "metrics.jsonl"
    try:
        wait_until(lambda: len(lines(metrics)) >= 3, 180, driver)
        below = descendants(driver.pid)
        assert len(below) >= 4  # the sweep, torchrun, two ranks
        os.kill(driver.pid, number)
        code = driver.wait(60)
        wait_until(lambda: not alive(below), 30, None)
    finally:
        for pid in alive(below):
            os.kill(pid, signal.SIGKILL)
    steps = len(lines(metrics))
    saved = folder / "seed-5" / "checkpoints" / f"step_{steps:08d}"
    assert saved.is_dir()  # the ranks were asked, by the sweep or because it was gone
    if number == signal.SIGTERM:
        assert code == 128 + signal.SIGTERM
        rows = table(folder)
        assert [row["status"] for row in rows.values()] == ["stopped", "waiting"]
        assert rows["seed-5"]["step"] == steps
        finite = [f"train.max_steps={steps + 1}", "hydra.launcher.kind=python"]
        code, said = done(sweep(store, folder, "seed=choice(5)", *finite), tmp_path / "again")
        assert code == 0, said
        assert f"resuming from {saved}" in (folder / "seed-5" / "launch.log").read_text()
        assert [json.loads(x)["step"] for x in lines(metrics)] == [*range(1, steps + 2)]


def rank_0() -> None:
    os.environ.update(RANK="0", WORLD_SIZE="2")


def rank_1() -> None:
    os.environ.update(RANK="1", WORLD_SIZE="2")


def test_a_sweep_below_a_launcher_is_refused_once(tmp_path):
    arguments = sweep(tmp_path, tmp_path / "sweep", "seed=1,2")[2:]
    assert run_entry(arguments, tmp_path / "log", rank_0).error.startswith("a sweep (-m) starts")
    other = run_entry(arguments, tmp_path / "log", rank_1)
    assert (other.code, other.out, other.err) == (2, "", "")
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["seed=1,2", "run_dir=x"], "run_dir= is the directory of one run"),
        (["recipe=pi,nowhere"], "recipe=nowhere is not one of"),
        (["seed=1,2", "hydra.launcher.kind=mpirun"], "hydra.launcher.kind=mpirun is not one of"),
        (["seed=1,2", "hydra.launcher.proc=2"], "hydra.launcher.proc is not a setting"),
    ],
)
def test_mistakes_start_nothing(more, line, tmp_path):
    folder = tmp_path / "sweep"
    assert line in run_entry(sweep(tmp_path, folder, *more)[2:], tmp_path / "log").error
    assert not list(folder.glob("*/launch.log"))
