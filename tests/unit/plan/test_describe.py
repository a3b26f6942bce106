"""What a run says of its data before it starts."""

import pytest

from longctx.errors import UserError
from longctx.plan import describe
from longctx.recipes.causal_lm import RECIPE
from tests.helpers.tiny import make_store, tiny_run


def data_lines(run):
    lines = describe.report(run, RECIPE).splitlines()
    return [line for line in lines if line.startswith(("data: ", "warning: "))]


def test_the_plan_says_how_often_each_store_is_read(tmp_path):
    stores = [make_store(tmp_path / name, seed=i) for i, name in enumerate("ab")]
    chosen = f"data.store=['{stores[0]}','{stores[1]}']"
    more = ("data.weights=[9,1]", "train.max_steps=60")
    run = tiny_run(stores[0], tmp_path / "run", chosen, *more)
    first, warning, second = data_lines(run)
    assert first.startswith("data: data.store[0]: 40 documents, ") and "90.0% of the rows" in first
    assert second.startswith("data: data.store[1]: 40 documents, ")
    rows = len(RECIPE.build_data(run).train.sources[0])
    assert first.endswith(f"; {0.9 * 60 * 8 / rows:.3g} epochs")
    assert warning.startswith(f"warning: that is {0.9 * 60 * 8 / rows:.3g} times the same text")


def test_a_plan_can_be_made_where_the_data_is_not(tmp_path):
    run = tiny_run(tmp_path / "nowhere", tmp_path / "run")
    (line,) = data_lines(run)
    assert line.startswith(f"data: {tmp_path}/nowhere: no such token store")


def test_a_decoder_alone_has_no_plan_with_contexts(tmp_path):
    run = tiny_run(tmp_path / "x", tmp_path / "run", "contexts.count=4", "contexts.size=64")
    with pytest.raises(UserError, match=r"trains a decoder alone: no encoder=, no contexts.count"):
        describe.report(run, RECIPE)
