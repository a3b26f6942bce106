"""What a resumed run must share with its checkpoint, and how a difference reads."""

import dataclasses
from pathlib import Path

import pytest

from longctx.data.store import Store
from longctx.errors import UserError
from longctx.recipes.causal_lm import RECIPE
from longctx.train.checkpoint.reader import Checkpoint
from longctx.train.checkpoint.resume import require_same
from tests.helpers.tiny import make_store, tiny_run

MODEL = {"trained": "1", "fixed": "2"}


def saved(run, fingerprint) -> Checkpoint:
    meta = {"step": 4, "run": dataclasses.asdict(run), "fingerprint": fingerprint}
    return Checkpoint(Path("step_00000004"), meta)


def look(run):
    return MODEL | {"data": RECIPE.build_data(run).train.identity}


@pytest.fixture
def run(tmp_path):
    return tiny_run(make_store(tmp_path / "store"), tmp_path / "run")


def refusal(checkpoint, run, fingerprint=None) -> str:
    with pytest.raises(UserError) as error:
        require_same(checkpoint, run, fingerprint or look(run))
    return str(error.value)


def test_the_same_run_goes_on(run):
    require_same(saved(run, look(run)), run, look(run))


def test_a_checkpoint_from_before_encoders_goes_on(run):
    checkpoint = saved(run, look(run))
    for group in ("encoder", "contexts", "cepe"):
        del checkpoint.meta["run"][group]
    del checkpoint.meta["run"]["data"]["mask_rate"]
    require_same(checkpoint, run, look(run))


def test_a_moved_store_is_the_same_data(tmp_path, run):
    moved = Path(run.data.store[0]).rename(tmp_path / "elsewhere")
    there = tiny_run(moved, tmp_path / "run2", "data.held_out=[]", "data.prefetch=0")
    checkpoint = saved(run, MODEL | {"data": RECIPE.build_data(there).train.identity})
    require_same(checkpoint, there, look(there))


def test_a_changed_store_is_named_with_both_digests(tmp_path, run):
    checkpoint = saved(run, look(run))
    before = Store(run.data.store[0]).meta["digest"][:12]
    other = tiny_run(make_store(tmp_path / "other", seed=1), tmp_path / "run")
    after = Store(other.data.store[0]).meta["digest"][:12]
    assert refusal(checkpoint, other) == (
        f"step_00000004 was trained on other data: data.store[0]: digest {before} -> digest {after}"
    )


def test_every_changed_part_of_the_data_is_named(tmp_path, run):
    checkpoint = saved(run, look(run))
    more = ("data.packing=concat", "data.seq_len=64", "data.weights=[2]", "seed=1")
    found = refusal(checkpoint, tiny_run(Path(run.data.store[0]), tmp_path / "run", *more))
    assert found == (
        "step_00000004 was trained on other data: data.packing: best_fit -> concat; "
        "data.seq_len: 32 -> 64; data.weights: None -> [2.0]; seed: 0 -> 1"
    )


def test_one_store_more_is_named(tmp_path, run):
    checkpoint = saved(run, look(run))
    second = make_store(tmp_path / "second", seed=2)
    both = tiny_run(second, tmp_path / "run", f"data.store=['{run.data.store[0]}','{second}']")
    digest = Store(second).meta["digest"][:12]
    assert refusal(checkpoint, both).endswith(f"other data: data.store[1]: none -> digest {digest}")


def test_a_checkpoint_with_one_digest_for_all_is_refused(run):
    """As the first version wrote them."""
    old = saved(run, MODEL | {"data": "0123abcd"})
    assert "written by an earlier version, whose data cannot be compared" in refusal(old, run)


def test_other_settings_are_named(tmp_path, run):
    more = ("optim.lr=0.5", "train.keep_last=9", "train.max_steps=30", "data.prefetch=0")
    more += ("force=true", "parallel.lost_after=0", "train.save_async=true", "train.skip_above=9")
    other = tiny_run(Path(run.data.store[0]), tmp_path / "elsewhere", *more)
    assert refusal(saved(run, look(run)), other) == (
        "step_00000004 comes from a run with other settings (optim.lr: 0.01 -> 0.5): "
        "take another run_dir or the old settings"
    )


def test_a_setting_that_came_later_is_not_a_difference(run):
    checkpoint = saved(run, look(run))
    del checkpoint.meta["run"]["data"]["prefetch"], checkpoint.meta["run"]["data"]["weights"]
    require_same(checkpoint, run, look(run))


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"trained": "9"}, "step_00000004 is of another model: trained parameters differ"),
        ({"fixed": "9"}, "was trained beside other frozen weights or rotary frequencies"),
    ],
)
def test_another_model_is_refused(run, changed, line):
    assert line in refusal(saved(run, look(run)), run, look(run) | changed)


def test_a_shorter_run_is_refused(tmp_path, run):
    short = tiny_run(Path(run.data.store[0]), tmp_path / "run", "train.max_steps=3")
    assert refusal(saved(run, look(run)), short).endswith("at step 4, beyond train.max_steps=3")
