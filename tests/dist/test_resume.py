"""A run that was killed ends bit for bit as one that was not."""

import json
import subprocess

import pytest

from tests.helpers.process import kill_tree, lines, start, torchrun, wait_until
from tests.helpers.tiny import make_store, tiny_arguments

STEPS = 60


@pytest.mark.dist
def test_sigkill_at_step_13_then_resume_is_bit_identical(tmp_path):
    store = make_store(tmp_path / "store")
    more = ("train.save_every=5", f"train.max_steps={STEPS}", "parallel.zero_stage=2")
    finals = {}
    for name, killed_at in (("whole", None), ("killed", 13)):
        run_dir = tmp_path / name
        command = torchrun(tiny_arguments(store, run_dir, *more))
        process = start(command, tmp_path / f"{name}.log")
        if killed_at is not None:
            metrics = run_dir / "metrics.jsonl"
            wait_until(lambda: len(lines(metrics)) >= killed_at, 120, process)  # noqa: B023
            kill_tree(process)
            assert killed_at <= len(lines(metrics)) < STEPS
            saved = sorted(p.name for p in (run_dir / "checkpoints").glob("step_*[0-9]"))
            assert saved and saved[-1] < f"step_{STEPS:08d}"
            process = start([*command, "resume=auto"], tmp_path / f"{name}.log")
        assert process.wait(180) == 0, (tmp_path / f"{name}.log").read_text()
        found = [json.loads(line) for line in lines(run_dir / "metrics.jsonl")]
        keep = ("step", "tokens", "loss", "lr", "grad_norm")
        last = run_dir / "checkpoints" / f"step_{STEPS:08d}"
        shards = {p.name: p.read_bytes() for p in last.glob("*.safetensors")}
        finals[name] = ([[m[k] for k in keep] for m in found], shards)
    assert "resuming from" in (tmp_path / "killed.log").read_text()
    assert len(finals["whole"][0]) == STEPS and len(finals["whole"][1]) == 2
    assert finals["killed"] == finals["whole"]


@pytest.mark.dist
def test_a_finished_run_is_left_as_it_is(tmp_path):
    store = make_store(tmp_path / "store")
    arguments = tiny_arguments(store, tmp_path / "run", "train.max_steps=2")
    for _ in range(2):
        done = subprocess.run(torchrun(arguments), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 2
