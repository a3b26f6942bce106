"""The short form of `make chaos`: a rank killed while saving, between steps and while starting."""

import pytest

from tests.dist.chaos import Kill, chaos, draw

SHORT = {
    False: [Kill("save", 1, 0.002, 1), Kill("step", 0, 0.01, 3), Kill("start", 1, 4.0, 1)],
    True: [Kill("step", 1, 0.0, 3), Kill("save", 0, 0.002, 1), Kill("save", 1, 0.0, 1)],
}


@pytest.mark.dist
@pytest.mark.parametrize("beside", [False, True])
def test_a_run_killed_three_times_ends_as_one_left_alone(beside, tmp_path):
    told = []
    assert chaos(tmp_path, SHORT[beside], beside, told.append), told
    assert sum("killed at save" in line for line in told) >= 1, told


def test_kills_are_of_all_kinds_and_repeatable():
    kills = draw(20, seed=3)
    assert kills == draw(20, seed=3) and kills != draw(20, seed=4)
    assert {k.moment for k in kills} == {"start", "step", "save"} and {k.rank for k in kills} == {
        0,
        1,
    }
