"""Ulysses sequence parallelism: a rank holds a part of the tokens and, inside attention, of heads.

`ulysses(attend, group)` has the signature of `attend`, which sees whole rows and fewer heads; so
every method and rope works unchanged, and it gets the positions of whole rows. Cost: two
exchanges a layer and direction, of `(hq + 2 hk + hq) d t` numbers on each rank; where there are
fewer key heads than ranks, keys and values count once a rank.
Source: DeepSpeed-Ulysses (2309.14509) section 3.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from longctx.errors import UserError

Attend = Callable[..., tuple[Tensor, Any]]


def ulysses(attend: Attend, group: dist.ProcessGroup) -> Attend:
    """The attention `attend` for tokens that are spread over the ranks of a group.

    Args:
        attend: what a method has, with transformers' attention-interface signature; it also gets
            `key_heads` `[hk/sp]`, the numbers in the model of those that are here.
        group: rank r holds the r-th part of each row.

    Returns:
        The same for query `[b hq t d]`, key and value `[b hk t d]`, `position_ids` `[b t]` and a
        result `[b t hq d]`.
    """
    gathered = WeakIdKeyDictionary()  # whole positions by local ones, which all layers share

    def attend_spread(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        if attention_mask is not None:
            raise UserError(
                "parallel.sp above 1 honours no attention mask: mark documents by positions that "
                "restart at 0, and padding by labels"
            )
        if key.shape[2] != query.shape[2]:
            raise UserError("parallel.sp above 1 reads whole rows, and this one continues a cache")
        local = kwargs.get("position_ids")
        if local is not None:
            if local not in gathered:
                gathered[local] = gather_tokens(local, group)
            kwargs["position_ids"] = gathered[local]
        require_heads(group.size(), query.shape[1], key.shape[1])
        copies = max(1, group.size() // key.shape[1])
        kwargs["key_heads"] = _own_heads(key.shape[1], group)
        if copies > 1:
            key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
        exchange: Any = _Exchange.apply
        query, key, value = exchange(group, 1, 2, query, key, value)
        out, weights = attend(module, query, key, value, None, *args, **kwargs)
        return exchange(group, 1, 2, out)[0], weights

    return attend_spread


def require_heads(sp: int, heads: int, key_heads: int) -> None:
    """Raises UserError if heads cannot be dealt out over the ranks of a row.

    Args:
        sp: ranks that share a row.
        heads: query heads of the model, hq.
        key_heads: its key heads, hk; shared by ranks where there are fewer.
    """
    if heads % sp:
        raise UserError(
            f"parallel.sp={sp} does not divide the model's {heads} attention heads: every rank "
            "needs as many"
        )
    if key_heads % sp and sp % key_heads:
        raise UserError(
            f"parallel.sp={sp} neither divides the model's {key_heads} key heads nor is a multiple "
            "of them"
        )


def gather_tokens(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Whole rows `[b s ...]` of parts `[b t ...]`, without gradients."""
    part = part.contiguous()
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part, group=group)
    return torch.cat(parts, dim=1)


def _own_heads(key_heads: int, group: dist.ProcessGroup) -> Tensor:
    """Numbers of the key heads that this rank's queries need; on CPU."""
    first = group.rank() * key_heads // group.size()
    return torch.arange(first, first + max(1, key_heads // group.size()))


class _Exchange(torch.autograd.Function):
    """Splits dimension `split` over the ranks and joins dimension `join`; backward is the reverse.

    Several tensors go in one exchange, so that no rank can order them otherwise than another.
    """

    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup, split: int, join: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.way = group, split, join
        return _exchanged(group, split, join, tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        group, split, join = ctx.way
        return None, None, None, *_exchanged(group, join, split, grads)


def _exchanged(
    group: dist.ProcessGroup, split: int, join: int, tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """`[.. p n .. m ..]` of each rank becomes `[.. n .. p m ..]`, contiguous, in one collective."""
    ranks = group.size()
    parts = [x.unflatten(split, (ranks, -1)).movedim(split, 0) for x in tensors]
    sizes = [part[0].numel() for part in parts]
    send = tensors[0].new_empty(ranks, sum(sizes))
    for part, place in zip(parts, send.split(sizes, dim=1), strict=True):
        place.view(part.shape).copy_(part)
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    pieces = zip(parts, received.split(sizes, dim=1), strict=True)
    return tuple(
        place.view(part.shape).movedim(0, join).flatten(join, join + 1).contiguous()
        for part, place in pieces
    )
