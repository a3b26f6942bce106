"""Prepares a model for rows that several ranks share (`parallel.sp`): its attention, its contexts.

What a rank's part of a row is stands in `longctx/parallel/mesh.py`, what it costs in `ulysses.py`
and `exchange.py` there.
"""

from typing import Any

from longctx.models.cepe.encoded_contexts import ReadsContexts
from longctx.models.wrap_attention import (
    attention_heads,
    require_angles_by_position,
    wrap_attention,
)
from longctx.parallel.exchange import RowRanks
from longctx.parallel.mesh import Mesh
from longctx.parallel.ulysses import require_heads, ulysses


def share_rows(model: Any, mesh: Mesh) -> None:
    """Lets a model read shards: from here on its tokens are a rank's part of each row.

    Args:
        model: what a recipe builds; changed in place, unless each rank has rows of its own.
        mesh: the ranks.

    Raises:
        UserError: if the model cannot be spread over so many ranks.
    """
    group = mesh.sp_group
    if group is None:
        return
    decoder = model.get_decoder()
    require_spreadable(decoder, mesh.sp_size)
    label = f"ulysses_{group.group_name}"
    wrap_attention(decoder, lambda attend: ulysses(attend, group), label)
    if isinstance(model, ReadsContexts):
        model.row_ranks = RowRanks(group)


def require_spreadable(decoder: Any, sp: int) -> None:
    """Raises UserError if a model cannot be spread over `sp` ranks.

    Args:
        decoder: what `get_decoder()` gives; shapes are enough.
        sp: ranks that share a row.
    """
    if sp > 1:
        require_heads(sp, *attention_heads(decoder))
        require_angles_by_position(decoder, f"parallel.sp={sp}")
