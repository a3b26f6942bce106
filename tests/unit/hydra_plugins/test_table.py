"""The table over a sweep, and why a point failed."""

import json

from hydra_plugins.longctx_jobs import _table as table
from hydra_plugins.longctx_jobs._table import Row


def rows(tmp_path):
    done = Row({"recipe": "pi", "optim.lr": "1e-05"}, "a", "done", 2.5, 2.25, 20, 31.4)
    worse = Row({"recipe": "pi", "optim.lr": "a|b"}, "b", "done before", 2.75, 2.5, 20, 29.0)
    failed = Row({"recipe": "direct_ft"}, "c", "failed", seconds=3.0, reason="no token is scored")
    return [done, worse, failed]


def test_markdown(tmp_path):
    assert table.markdown(rows(tmp_path)) == (
        "| recipe | optim.lr | status | held-out loss | loss | step | seconds | directory |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| pi | 1e-05 | done | **2.5000** | 2.2500 | 20 | 31 | a |\n"
        "| pi | a\\|b | done before | 2.7500 | 2.5000 | 20 | 29 | b |\n"
        "| direct_ft |  | failed |  |  |  | 3 | c |\n"
        "\n"
        "- c: no token is scored\n"
    )
    assert "**" not in table.markdown([Row({}, "a", "waiting")])


def test_files(tmp_path):
    table.write(tmp_path / "sweep", rows(tmp_path))
    assert (tmp_path / "sweep" / "sweep.md").read_text() == table.markdown(rows(tmp_path))
    found = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [Row(**row) for row in found] == rows(tmp_path)
    assert sorted(p.name for p in (tmp_path / "sweep").iterdir()) == ["sweep.json", "sweep.md"]


def test_metrics_are_those_of_the_last_lines(tmp_path):
    lines = [
        {"step": 1, "loss": 4.0, "eval_loss": 3.5},
        {"step": 2, "loss": 3.0, "eval_loss": 3.25},
        {"step": 3, "loss": 2.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    row = Row({}, str(tmp_path))
    row.read_metrics()
    assert (row.step, row.loss, row.held_out_loss) == (3, 2.0, 3.25)
    nothing = Row({}, str(tmp_path / "none"))
    nothing.read_metrics()
    assert (nothing.step, nothing.loss, nothing.held_out_loss) == (None, None, None)


def test_the_reason_of_a_failure():
    trace = (
        "Traceback (most recent call last):\n  File 'x.py'\n"
        "torch.OutOfMemoryError: CUDA out of memory\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
    )
    assert table.reason(1, trace) == "torch.OutOfMemoryError: CUDA out of memory"
    assert table.reason(2, f"{trace}error: seed=-1 must be at least 0\n") == (
        "seed=-1 must be at least 0"
    )
    assert table.reason(-9, "step 3\n") == "killed by SIGKILL"
    assert table.reason(7, "step: 3\n") == "exit code 7"
