"""Parts of a batch: tokens are cut, contexts stay, and put together they are the batch."""

import pytest
import torch

from longctx.batch import IGNORE, Batch
from longctx.errors import UserError
from longctx.parallel import mesh
from longctx.parallel.mesh import WHOLE, Mesh, shard

CPU = torch.device("cpu")


def batch(rows=3, length=12):
    random = torch.Generator().manual_seed(0)

    def ids(*shape):
        return torch.randint(0, 50, shape, generator=random)

    labels = ids(rows, length).masked_fill(ids(rows, length) > 25, IGNORE)
    return Batch(
        tokens=ids(rows, length),
        labels=labels,
        positions=torch.arange(length).expand(rows, length),
        contexts=ids(rows, 2, length),  # as long as a row: cut by name, not by shape
        context_mask=ids(rows, 2, length) > 10,
        teacher_ids=ids(rows, length, 4),
        teacher_probabilities=ids(rows, length, 5).float(),
    )


@pytest.mark.parametrize("sp", [2, 3, 4])
def test_parts_make_up_the_batch(sp):
    whole = batch()
    parts = [shard(whole, Mesh(5, 9, CPU, rank, sp)) for rank in range(sp)]
    for name, x in whole.tensors().items():
        found = [part.tensors()[name] for part in parts]
        if name in WHOLE:
            assert all(torch.equal(y, x) for y in found), name
        else:
            assert all(y.shape[1] == 12 // sp and y.is_contiguous() for y in found), name
            assert torch.equal(torch.cat(found, dim=1), x), name
    assert sum(part.scored for part in parts) == whole.scored


def test_a_rank_alone_keeps_its_batch():
    whole = batch()
    assert shard(whole, Mesh(0, 1, CPU)) is whole


def test_neighbours_share_a_row():
    ranks = [Mesh(r // 2, 3, CPU, r % 2, 2) for r in range(6)]
    assert [m.rank for m in ranks] == list(range(6)) and {m.ranks for m in ranks} == {6}
    assert [m.main for m in ranks] == [True] + [False] * 5
    assert mesh.rows_at_once(6, 2) == 3
    with pytest.raises(UserError, match=r"parallel\.sp=4 does not divide the 6 processes"):
        mesh.rows_at_once(6, 4)
