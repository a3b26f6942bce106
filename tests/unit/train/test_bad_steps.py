import json
import math
from types import SimpleNamespace

import pytest

from longctx.train.optim import FEWEST, WINDOW, DivergedError, Guard


def guard(max_skipped=3, skip_above=0.0, **state):
    return Guard(SimpleNamespace(max_skipped=max_skipped, skip_above=skip_above), **state)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_bad(bad):
    assert guard().accepts(1.0, 1e30)
    assert not guard().accepts(bad, 1.0)
    assert not guard().accepts(1.0, bad)


def test_so_many_in_a_row_end_the_run():
    watch = guard(max_skipped=3)
    for step, taken in enumerate([False, False, True, False, False], 1):
        line = watch.note(step, math.nan, math.inf, taken)
        assert (line is None) == taken
    assert line == (
        "warning: step 5 skipped: the loss is nan, the gradient norm inf (4 skipped so far)"
    )
    with pytest.raises(DivergedError, match=r"step 6: .* is bad step number 3 in a row"):
        watch.note(6, math.nan, math.inf, taken=False)
    assert watch.skipped == 5


def test_one_bad_step_ends_a_run_that_wants_it_so():
    with pytest.raises(DivergedError, match=r"step 1: "):
        guard(max_skipped=1).note(1, math.inf, 1.0, taken=False)


def test_unusual_norms_are_bad_once_it_is_known_what_is_usual():
    watch = guard(skip_above=10)
    for step in range(FEWEST):
        assert watch.accepts(1.0, 1e9)  # nothing is usual yet
        watch.note(step, 1.0, 2.0 + (step % 2), taken=True)  # median 2.5
    assert watch.accepts(1.0, 25.0) and not watch.accepts(1.0, 25.1)
    line = watch.note(FEWEST, 1.0, 25.1, taken=False)
    assert "gradient norm 25.1, usual is 2.5 (1 skipped" in line
    assert watch.norms == [2.0, 3.0] * (FEWEST // 2)  # a bad one does not become usual
    assert guard(norms=watch.norms).accepts(1.0, 1e9)  # 0 is never


def test_what_is_usual_is_that_of_the_last_steps():
    watch = guard(skip_above=2)
    for step in range(3 * WINDOW):
        watch.note(step, 1.0, 1.0 if step < 2 * WINDOW else 100.0, taken=True)
    assert watch.norms == [100.0] * WINDOW and watch.accepts(1.0, 200.0)


def test_its_state_comes_back_exactly():
    watch = guard(skip_above=1.5)
    for step in range(40):
        watch.note(step, 1.0, math.sqrt(step + 2), taken=step % 7 != 0)
    again = guard(skip_above=1.5, **json.loads(json.dumps(watch.state())))
    assert again.state() == watch.state()
    assert again.norms[3].hex() == watch.norms[3].hex()
