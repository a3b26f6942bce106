"""One row over several processes, for lengths that do not fit one device (`parallel_sp`).

Each rank runs the decoder on its part of the tokens (Ulysses inside attention) and then gets the
last hidden states of all of them, so scoring is the same code as in one process. Costs two
exchanges a layer and one gathering of `b s h` states a forward pass; a rank holds 1/sp of the
activations in between. Forward passes over whole rows only: nothing is decoded through a cache.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from longctx.errors import UserError
from longctx.models.wrap_attention import (
    attention_heads,
    require_angles_by_position,
    wrap_attention,
)
from longctx.parallel.mesh import Mesh
from longctx.parallel.ulysses import gather_tokens, require_heads, ulysses


class SpreadDecoder:
    """Called as a decoder is; its result has the states of all tokens.

    Args:
        decoder: with its attention wrapped already.
        mesh: the ranks.
    """

    def __init__(self, decoder: nn.Module, mesh: Mesh) -> None:
        self._decoder, self._mesh = decoder, mesh

    def __call__(self, input_ids: Tensor) -> Tensor:
        """`[b s]` tokens to `[b s h]` states, the same on all ranks of a row."""
        assert self._mesh.sp_group is not None
        count, sp = input_ids.shape[1], self._mesh.sp_size
        own = -(-count // sp)
        whole = pad(
            input_ids, (0, own * sp - count)
        )  # causal: the padding changes no state before it
        start = self._mesh.sp_rank * own
        positions = torch.arange(own * sp, device=whole.device).expand_as(whole)
        out = self._decoder(
            input_ids=whole[:, start : start + own].contiguous(),
            position_ids=positions[:, start : start + own].contiguous(),
            use_cache=False,
        )
        return gather_tokens(out.last_hidden_state, self._mesh.sp_group)[:, :count]


def spread(model: Any, mesh: Mesh | None) -> Any:
    """Lets a model read rows that several ranks share; `longctx.eval.score.states` calls it so.

    Args:
        model: changed in place, unless each rank has rows of its own.
        mesh: the ranks; None: this one alone.

    Returns:
        The model.

    Raises:
        UserError: if it cannot be spread over this many ranks.
    """
    if mesh is None or mesh.sp_group is None:
        return model
    group = mesh.sp_group
    if hasattr(model, "encode"):
        raise UserError(f"parallel_sp={mesh.sp_size}: a model with an encoder cannot be spread")
    decoder = model.get_decoder()
    require_heads(mesh.sp_size, *attention_heads(decoder))
    require_angles_by_position(decoder, f"parallel_sp={mesh.sp_size}")
    wrap_attention(decoder, lambda attend: ulysses(attend, group), f"eval_{group.group_name}")
    model.spread_decoder = SpreadDecoder(decoder, mesh)
    return model
