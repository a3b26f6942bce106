"""A reader of one training step opens few files."""

import pytest

from lab.step_files import step_files

pytestmark = pytest.mark.long

MOST = 16


def test_a_training_step_touches_few_files():
    found = step_files(["recipe=pi", "model=lab", "data=store", "data.store=[x]"])
    assert {"longctx/train/trainer.py", "longctx/data/store.py", "recipes/causal_lm.py"} <= set(
        found
    )
    assert len(found) <= MOST, found
