"""What the ranks that share a row do outside attention: distribute contexts, move tokens.

Encoder chunks do not see each other, so each rank encodes some of them and all ranks gather all
states. Costs one gather of the states and, in the backward pass, one exchange of the same size.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from longctx.parallel.ulysses import gather_tokens


class RowRanks:
    """The ranks that share a row, for a model that reads contexts.

    What the model asks of it is `longctx.models.cepe.encoded_contexts.EncodingRanks`.

    Args:
        group: rank r holds the r-th part of each row.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = group.rank(), group.size()

    def gather(self, part: Tensor) -> Tensor:
        """Concatenates the parts of all ranks; their gradients are summed over the ranks.

        Args:
            part: `[k ...]`, of one shape on all ranks.

        Returns:
            `[size*k ...]`.
        """
        gathered: Any = _Gather.apply
        whole: Tensor = gathered(part, self.group)
        return whole

    def whole(self, part: Tensor) -> Tensor:
        """Whole rows `[b s ...]` of parts `[b t ...]`, without gradients."""
        return gather_tokens(part, self.group)

    def moved(self, part: Tensor, start: int, own: int) -> Tensor:
        """Moves tokens to another split of the same sequence, without gradients.

        Each token goes to one rank only.

        Args:
            part: `[b m ...]`, the rank-th m tokens of a sequence.
            start: token at which the first rank's new part starts.
            own: tokens in each new part.

        Returns:
            `[b own ...]`: tokens from `start + rank own` on.
        """
        held = part.shape[1]
        here = self.rank * held, self.rank * held + held
        wanted = start + self.rank * own, start + self.rank * own + own
        send = [_common(here, (start + r * own, start + r * own + own)) for r in range(self.size)]
        get = [_common((r * held, r * held + held), wanted) for r in range(self.size)]
        tokens = part.transpose(0, 1)
        parcel = torch.cat([tokens[a - here[0] : b - here[0]] for a, b in send])
        received = parcel.new_empty(own, *parcel.shape[1:])
        coming, going = ([b - a for a, b in ends] for ends in (get, send))
        dist.all_to_all_single(received, parcel, coming, going, group=self.group)
        return received.transpose(0, 1)


def _common(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    """The overlap of two ranges as (first, one past the last); an empty one starts in the first."""
    first = min(max(one[0], other[0]), one[1])
    return first, max(first, min(one[1], other[1]))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part, group=group)
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Each rank's part of the sum over ranks, added up in fp32 at least."""
        ranks = ctx.group.size()
        send = grad.contiguous()
        received = torch.empty_like(send)
        dist.all_to_all_single(received, send, group=ctx.group)
        wide = torch.promote_types(grad.dtype, torch.float32)
        parts = received.unflatten(0, (ranks, -1))
        return parts.sum(0, dtype=wide).to(grad.dtype), None
