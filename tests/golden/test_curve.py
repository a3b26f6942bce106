"""Twenty steps of the tiny recipes, number by number, as they were when they were last looked at.

A change here is a change of numerics: rewrite with `make golden` and say why in CHANGELOG.md.
Other CPUs and other versions of torch add up in another order, hence the tolerance.
"""

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.entry import run_entry
from tests.helpers.tiny import make_store, tiny_arguments

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-6
MORE = {
    "pretrain": [],
    "pi": [
        "recipe=pi",
        "model=lab_scratch",
        "family=path",  # the numbers of the paper, not those of the lab
        "data.seq_len=64",
        "optim.warmup_steps=5",
        "train.batch_rows=4",
        "train.dtype=fp32",
        "train.eval_rows=4",
    ],
}


@pytest.mark.parametrize("recipe", MORE)
def test_curve(recipe, tmp_path, update_golden):
    store = make_store(tmp_path / "store")
    arguments = tiny_arguments(store, tmp_path / "run", *MORE[recipe])
    if recipe != "pretrain":
        arguments.remove("recipe=pretrain")
    done = run_entry(arguments, tmp_path / "log")
    assert done.code == 0, done.err[-2000:]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    found = {
        "torch": torch.__version__,
        "arguments": [a.replace(str(tmp_path), "TMP") for a in arguments],
        "eval_loss": metrics[-1]["eval_loss"],
        "loss": [m["loss"] for m in metrics],
        "grad_norm": [m["grad_norm"] for m in metrics],
    }
    file = HERE / f"{recipe}.json"
    if update_golden:
        file.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(file.read_text())
    assert found["arguments"] == golden["arguments"], "the file is of another run: make golden"
    assert len(found["loss"]) == 20
    for key in ("loss", "grad_norm", "eval_loss"):
        assert found[key] == pytest.approx(golden[key], rel=TOLERANCE, abs=0), (
            f"{key} differs; the file was made with torch {golden['torch']}"
        )
