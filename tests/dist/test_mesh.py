"""The collectives of the trainer on two ranks."""

import pytest

from longctx.parallel import mesh
from tests.helpers.spawn import spawn


def _check() -> None:
    ranks = mesh.start()
    assert ranks.dp_size == 2 and ranks.main == (ranks.dp_rank == 0)
    # 2^53 - 1 and 1 have an exact sum in float64 only.
    assert ranks.sum([2**53 - 1, 1][ranks.dp_rank]) == 2**53
    ranks.barrier()
    first = mesh.first_to("speak")
    assert ranks.sum(first) == 1
    assert not mesh.first_to("speak")


@pytest.mark.dist
def test_two_ranks_sum_and_take_turns() -> None:
    spawn(_check, 2)
