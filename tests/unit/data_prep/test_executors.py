"""Work runs in parallel, stops in one line, and becomes SLURM jobs that run."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from longctx.data.store import Store
from longctx.data_prep import executors
from longctx.data_prep.executors import Job, check_options
from longctx.data_prep.filter_redpajama import main
from longctx.data_prep.inputs import Piece
from longctx.data_prep.settings import ExecutorConfig
from longctx.data_prep.work import Work, plan_text
from longctx.errors import UserError
from tests.conftest import ROOT
from tests.helpers.raw import config, digests, line, write
from tests.helpers.steps import Step

SBATCH = f"""#!{sys.executable}
# Runs an array job at once, and notes how it was called.
import os, pathlib, re, subprocess, sys
here = pathlib.Path(__file__).parent
script = pathlib.Path(sys.argv[-1]).read_text()
number = len(list(here.glob("job-*.sh"))) + 1
(here / f"job-{{number}}.sh").write_text(" ".join(sys.argv[1:-1]) + chr(10) + script)
last = int(re.search("--array=0-([0-9]+)", script)[1])
if "merge_stats" not in script:
    for task in range(last + 1):
        env = os.environ | {{"SLURM_ARRAY_TASK_ID": str(task), "SLURM_NODELIST": "node"}}
        subprocess.run(["bash"], input=script, text=True, env=env, check=True,
                       stdout=sys.stderr)
print("Submitted batch job", number)
"""
SRUN = '#!/bin/bash\nwhile [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done\nexec "$@"\n'
SCONTROL = "#!/bin/bash\necho node\n"


def job(folder: Path, deed: str = "none", tasks: int = 3) -> Job:
    pieces = [Piece(f"/{i}", "jsonl", "text", 0, 10, 10, "") for i in range(tasks)]
    text = plan_text([[piece] for piece in pieces], {})
    marks = folder / "marks"
    marks.mkdir(exist_ok=True)
    step = Step(marks, deed)
    return Job(Work.of(folder / "work", text), text, step, Step(marks / ".."), 2, {})


def test_workers_run_at_the_same_time(tmp_path: Path) -> None:
    executors.run("local", job(tmp_path, "meet", tasks=2))
    first, second = ((tmp_path / "marks" / name).read_text() for name in "01")
    assert first != second


@pytest.mark.parametrize(
    ("deed", "message"),
    [
        ("kill", "a worker was killed, .*: the same command continues"),
        ("refuse", "does not want to"),
    ],
)
def test_a_failing_task_stops_the_run_in_one_line(
    deed: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=message) as error:
        executors.run("local", job(tmp_path, deed))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "0").exists()  # stage two
    assert "does not want to" not in capfd.readouterr().err
    again = job(tmp_path)
    marks = again.work.logs("tokenize") / "completions"
    before = {mark.name for mark in marks.iterdir()} if marks.is_dir() else set()
    assert "00001" not in before
    for rank in before:
        (tmp_path / "marks" / str(int(rank))).unlink()
    executors.run("local", again)
    redone = {f"{int(path.name):05d}" for path in (tmp_path / "marks").iterdir()}
    assert redone == {"00000", "00001", "00002"} - before
    assert (tmp_path / "0").exists()


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    first = job(tmp_path)
    first.work.prepare(first.plan)
    with first.work.locked(), pytest.raises(UserError, match="another run is using"):
        executors.run("local", job(tmp_path))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("spark", {}, "executor=spark is not one of local, slurm, ray"),
        (
            "local",
            {"partition": "p"},
            "executor.options.partition is not an option .* start_method",
        ),
        ("local", {"tasks": 3}, "executor.options.tasks is not an option"),
        ("slurm", {"particion": "p"}, "executor.options.particion is not .* partition, cpus_per_"),
    ],
)
def test_options_are_datatroves(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_options(name, options)


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_ray_says_how_to_get_it() -> None:
    with pytest.raises(UserError, match=r"executor=ray needs Ray: pip install -e '\.\[ray\]'"):
        check_options("ray", {})


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: .[ray]")
def test_ray_makes_what_local_makes(tmp_path: Path) -> None:
    write(tmp_path / "raw" / "c4" / "a.jsonl", *(line(f"{i} word " * i) for i in range(1, 60)))
    ray = ExecutorConfig("ray", {"mem_per_cpu_gb": 0.5})
    small = {"split_mib": 0.003, "workers": 2}
    main(config(tmp_path / "raw", tmp_path / "ray", executor=ray, **small))
    main(config(tmp_path / "raw", tmp_path / "local", **small))
    assert digests(tmp_path / "ray") == digests(tmp_path / "local")


def slurm(**more: Any) -> ExecutorConfig:
    return ExecutorConfig("slurm", {"partition": "cpu", "time": "04:00:00", "qos": None, **more})


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of commands that act like those of SLURM, first in PATH."""
    folder = tmp_path / "bin"
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        command(folder / name, text)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def command(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def test_slurm_jobs_are_right_and_run(
    tmp_path: Path, tools: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "raw" / "c4" / "a.jsonl", *(line(f"{i} word " * i) for i in range(1, 40)))
    settings = config(
        tmp_path / "raw", tmp_path / "out", split_mib=0.004, workers=8,
        executor=slurm(mem_per_cpu_gb=6, sbatch_args={"account": "us"}),
    )  # fmt: skip
    main(settings)
    assert "submitted: 2 tasks, then job 3 that makes" in capfd.readouterr().out
    first, last = ((tools / f"job-{i}.sh").read_text() for i in (1, 3))
    for wanted in (
        "--array=0-1%8", "--partition=cpu", "--time=04:00:00", "--mem-per-cpu=6G", "--account=us",
        "--job-name=longctx-tokenize", f'export PATH="{Path(sys.executable).parent}:$PATH"',
        f'PYTHONPATH="{ROOT}${{PYTHONPATH:+:$PYTHONPATH}}"', "launch_pickled_pipeline",
    ):  # fmt: skip
        assert wanted in first
    assert "qos" not in first
    assert "--dependency=afterok:1" in last.splitlines()[0]
    assert "--job-name=longctx-assemble" in last
    Store(tmp_path / "out" / "c4").verify()
    main(settings)
    assert capfd.readouterr().out == f"{tmp_path / 'out'}: already done\n"


def test_a_submitted_job_is_remembered(
    tmp_path: Path, tools: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "raw" / "a.jsonl", line("a"))
    command(tools / "sbatch", "#!/bin/bash\ntouch $0-$$\necho Submitted batch job 41\n")
    settings = config(tmp_path / "raw", tmp_path / "out", executor=slurm())
    main(settings)
    assert "job 41 was submitted" not in capfd.readouterr().out
    main(settings)  # there is no squeue
    assert "job 41 was submitted for this before\n" in capfd.readouterr().out
    command(tools / "squeue", '#!/bin/bash\n[ "$*" = "-j 41 -h" ] && echo 41 cpu longctx\n')
    calls = len(list(tools.glob("sbatch-*")))
    with pytest.raises(UserError, match="job 41, submitted before, is still in the queue: wait"):
        main(settings)
    assert len(list(tools.glob("sbatch-*"))) == calls
    command(tools / "squeue", "#!/bin/bash\necho Invalid job id specified >&2\nexit 1\n")
    main(settings)
    assert "job 41 was submitted for this before\n" in capfd.readouterr().out


def test_what_is_missing_can_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longctx.data_prep.filter_redpajama.NEEDED", ("no_such_module",))
    with pytest.raises(UserError, match=r"pip install -e '\.\[prep\]'"):
        main(config(tmp_path, tmp_path / "out"))


def test_slurm_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "raw" / "a.jsonl", line("a"))
    settings = config(tmp_path / "raw", tmp_path / "out", executor=slurm())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch is not installed"):
        main(settings)

    def refuse(*_: object, **__: object) -> bytes:
        raise subprocess.CalledProcessError(7, "sbatch")

    monkeypatch.setattr(subprocess, "check_output", refuse)
    with pytest.raises(UserError, match=r"sbatch refused the job \(exit code 7\)"):
        main(settings)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    with pytest.raises(UserError, match="start it outside of an array job"):
        main(settings)
