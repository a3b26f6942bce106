"""A rank's part of a batch, where several ranks share a row (`parallel.sp`).

Each of them reads the same rows and keeps its tokens: no communication, and a copy of those.
"""

from longctx.batch import Batch
from longctx.parallel.mesh import Mesh

WHOLE = ("contexts", "context_mask")  # every rank's tokens see all contexts of their row


def shard(batch: Batch, mesh: Mesh) -> Batch:
    """The tokens of this rank: the sp_rank-th of sp_size equal parts of each row.

    Labels are shifted already, so the last token of a part has its label here; positions are the
    true ones, which go on from the part before.

    Args:
        batch: whole rows.
        mesh: the ranks.
    """
    if mesh.sp_size == 1:
        return batch
    length = batch.tokens.shape[1]
    assert length % mesh.sp_size == 0, "RunConfig checks it"
    own = length // mesh.sp_size
    start = mesh.sp_rank * own
    parts = {
        name: x if name in WHOLE else x[:, start : start + own].contiguous()
        for name, x in batch.tensors().items()
    }
    return Batch(**parts)
