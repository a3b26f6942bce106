from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longctx import cli
from longctx.batch import IGNORE
from longctx.config import RunConfig
from longctx.config.in_loop import InLoopConfig
from longctx.errors import UserError
from longctx.eval.in_loop import Row, probe
from longctx.models.load import load_model
from longctx.train.probe import row_scores

LAB = Path(__file__).resolve().parents[3] / "assets" / "lab-llama"


class Alone:
    """One process with the lab model."""

    dp_rank, dp_size, sp_size = 0, 1, 1

    def __init__(self, model):
        self.model = model

    def sums(self, values):
        return values

    def score(self, batch):
        with torch.no_grad():
            return row_scores(self.model, batch).tolist()


def run_with(*more):
    arguments = ["recipe=pi", "model=lab", "data.held_out=[]", "run_dir=x", "logger=none", *more]
    return cli.compose(arguments, RunConfig, "train", "run_schema")


def test_a_row_scores_its_last_tokens_and_no_filling():
    batch = Row([7, 8, 9, 10], 2).batch(6)
    assert batch.tokens.tolist() == [[7, 8, 9, 10, 0, 0]]
    assert batch.labels.tolist() == [[IGNORE, 9, 10, IGNORE, IGNORE, IGNORE]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5]]
    with pytest.raises(AssertionError, match="truncated"):
        Row([1] * 7, 1).batch(6)


def test_the_lab_model_finds_keys_inside_its_window_and_not_far_beyond():
    asked = run_with("in_loop.every=1", "in_loop.lengths=[256,1024]", "in_loop.documents=0")
    found = probe(replace(asked, in_loop=replace(asked.in_loop, passkeys=4)))(
        Alone(load_model(str(LAB)).eval())
    )
    assert list(found) == ["eval_passkey_256", "eval_passkey_1024"]
    assert found["eval_passkey_256"] == 1.0 and found["eval_passkey_1024"] < 1.0


def test_it_is_off_by_default():
    run = run_with()
    assert run.in_loop.every == 0 and probe(run) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": []}, r"needs in_loop.lengths"),
        ({"documents": 0, "passkeys": 0}, "above 0"),
        ({"target_tokens": 256}, "must be shorter than every window"),
        ({"every": -1}, "in_loop.every=-1 must be at least 0"),
    ],
)
def test_settings_that_make_no_sense(change, message):
    with pytest.raises(UserError, match=message):
        InLoopConfig(**{"every": 5, "lengths": [256], "documents": 2} | change)


def test_what_is_missing_is_told_before_the_first_step():
    with pytest.raises(UserError, match=r"in_loop.documents=8 needs data.held_out"):
        probe(run_with("in_loop.every=1", "in_loop.lengths=[256]"))
