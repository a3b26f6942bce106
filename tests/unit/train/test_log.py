import json
import resource
import sys
from types import SimpleNamespace

import pytest
import yaml

from longctx.config import WandbConfig
from longctx.errors import UserError
from longctx.train.log import METRICS, Log, read_metrics, write_config

CONFIG = {"name": "pi", "train": {"max_steps": 5}}


def fill(run_dir, steps, tail=""):
    run_dir.mkdir(exist_ok=True)
    lines = [json.dumps({"step": s, "loss": 1 / s}) + "\n" for s in steps]
    (run_dir / METRICS).write_text("".join(lines) + tail)


def test_half_written_last_line_is_left_out(run_dir):
    fill(run_dir, [1, 2], tail='{"step": 3, "lo')
    assert [x["step"] for x in read_metrics(run_dir)] == [1, 2]


def test_no_metrics_yet(run_dir):
    assert read_metrics(run_dir) == []


def test_lines_after_the_resumed_step_are_dropped(run_dir, capsys):
    fill(run_dir, [1, 2, 3, 4], tail='{"step": 5, "lo')
    before = (run_dir / METRICS).read_text().splitlines()
    log = Log(run_dir, CONFIG, first_step=2, max_steps=5, wandb=None)
    log.step({"step": 3, "loss": 0.1, "eval_loss": None})
    log.close()
    after = (run_dir / METRICS).read_text().splitlines()
    assert after == [*before[:2], '{"step": 3, "loss": 0.1, "eval_loss": null}']
    assert [p.name for p in run_dir.iterdir()] == [METRICS]
    assert "3/5" in capsys.readouterr().err


def test_each_line_is_on_disk_at_once_and_exact(run_dir):
    run_dir.mkdir()
    log = Log(run_dir, CONFIG, first_step=0, max_steps=5, wandb=None)
    log.step({"step": 1, "loss": 0.1 + 0.2})
    assert read_metrics(run_dir) == [{"step": 1, "loss": 0.1 + 0.2}]
    log.close()


def test_lines_wait_for_room_on_the_disk(run_dir, capsys):
    run_dir.mkdir()
    log = Log(run_dir, CONFIG, first_step=0, max_steps=5, wandb=None)
    log.step({"step": 1, "loss": 0.5})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, before[1]))  # of a file, bytes
    try:
        for step in (2, 3):
            log.step({"step": step, "loss": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [x["step"] for x in read_metrics(run_dir)] == [1]
    assert (run_dir / METRICS).stat().st_size == 40  # half a line
    log.step({"step": 4, "loss": 0.5})
    assert [x["step"] for x in read_metrics(run_dir)] == [1, 2, 3, 4]
    log.close()
    warnings = [x for x in capsys.readouterr().err.splitlines() if "warning: " in x]
    assert len(warnings) == 1 and "metrics.jsonl cannot be written: [Errno 27]" in warnings[0]


def test_numbers_that_json_does_not_know_are_null(run_dir):
    run_dir.mkdir()
    log = Log(run_dir, CONFIG, first_step=0, max_steps=5, wandb=None)
    log.step({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "eval_loss": None})
    log.close()
    line = (run_dir / METRICS).read_text()
    assert line == '{"step": 1, "loss": null, "grad_norm": null, "eval_loss": null}\n'


def test_config_is_kept(run_dir):
    write_config(run_dir / "deep", CONFIG)
    assert yaml.safe_load((run_dir / "deep" / "config.yaml").read_text()) == CONFIG
    assert [p.name for p in (run_dir / "deep").iterdir()] == ["config.yaml"]


def test_config_that_cannot_be_kept(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run_dir=.*file cannot be written: File exists"):
        write_config(tmp_path / "file", CONFIG)


class FakeWandb:
    def __init__(self) -> None:
        self.started: list[dict] = []
        self.logged: list[dict] = []
        self.finished = 0

    def init(self, **settings: object) -> SimpleNamespace:
        self.started.append(settings)
        return SimpleNamespace(log=self.logged.append, finish=self.finish)

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.parametrize(
    ("mode", "key", "used"),
    [
        ("auto", None, "offline"),
        ("auto", "secret", "online"),
        ("offline", "secret", "offline"),
        ("online", None, "online"),
    ],
)
def test_wandb_gets_what_the_file_gets(mode, key, used, run_dir, tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    run_dir.mkdir()
    for _ in range(2):  # a resumed run goes on under the same id
        log = Log(run_dir, CONFIG, 0, 5, WandbConfig(project="p", entity=None, mode=mode))
        log.step({"step": 1, "loss": 0.5, "eval_loss": None})
        log.close()
    first, second = wandb.started
    assert (first["mode"], first["project"], first["config"]) == (used, "p", CONFIG)
    assert first["id"] == second["id"] and first["resume"] == "allow"
    assert first["dir"] == str(run_dir)
    assert wandb.logged == [{"step": 1, "loss": 0.5}] * 2 and wandb.finished == 2
