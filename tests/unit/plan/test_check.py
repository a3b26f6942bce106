"""What `train.py` asks before it starts: a run that cannot fit ends with what would help."""

import pytest

from longctx.errors import UserError
from longctx.plan import check
from longctx.plan.machine import Machine
from longctx.recipes.causal_lm import RECIPE
from tests.helpers.tiny import tiny_run

LONG = ("train.micro_batch_rows=8", "data.seq_len=256")  # 6.4 MiB; 3.1 with checkpointing
LINE = (
    "this run needs about 0.00628 GiB a rank at loss, and {} GiB are free: {}; force=true starts "
    "it all the same"
)


@pytest.fixture
def free(monkeypatch):
    """Sets what a rank has free, GiB."""

    def has(gib):
        machine = Machine(gpu_memory=gib, reserve=0, is_gpu=False)
        monkeypatch.setattr(check, "here", lambda ranks: machine)

    return has


def ask(tmp_path, *more):
    check.require_fit(tiny_run(tmp_path, tmp_path / "run", *LONG, *more), RECIPE, 1)


def test_it_names_what_helps_and_force_starts_it(free, tmp_path):
    free(0.005)
    with pytest.raises(UserError) as said:
        ask(tmp_path)
    helps = "parallel.activation_checkpointing=true would make it fit"
    assert str(said.value) == LINE.format("0.005", helps)
    ask(tmp_path, "parallel.activation_checkpointing=true")
    ask(tmp_path, "force=true")
    free(1e-5)
    with pytest.raises(UserError) as said:
        ask(tmp_path)
    assert str(said.value) == LINE.format("1e-05", "no setting makes it fit")


def test_what_fits_starts_also_within_the_error_of_a_plan(free, tmp_path):
    free(0.00628 / 1.1)
    ask(tmp_path)
    free(0.00628 / 1.2)
    with pytest.raises(UserError):
        ask(tmp_path)


def test_a_small_run_is_not_planned(free, monkeypatch, tmp_path):
    monkeypatch.setattr(check, "Planner", None)
    free(64)
    ask(tmp_path)
