"""An FFN that runs on a tile of tokens at a time, forward and backward.

Tensors of the inner width (3 to 4 of `[n i]` in an FFN of width i) exist for one tile only; input
and output stay whole. Costs a second forward of the FFN in the backward pass (a third under
activation checkpointing), and while one FFN's backward runs, its weight gradients once in fp32.

Weight gradients are returned by one autograd function, so that hooks on a parameter (ZeRO,
accumulation) see its whole gradient once, not once per tile. Source: the idea is that of
ALST (2506.13996) section 3.3.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from longctx.errors import UserError


def tile_mlps(model: nn.Module, tile: int) -> int:
    """Makes every FFN of a model work in tiles; its parameters and names stay.

    Args:
        model: of transformers; a module called `mlp` of linear layers and activations is an FFN.
        tile: tokens, over all rows.

    Returns:
        How many FFNs there are.

    Raises:
        UserError: if there is none, or one mixes tokens or routes them (experts).
    """
    found = [m for name, m in model.named_modules() if name.rpartition(".")[2] == "mlp"]
    for mlp in found:
        odd = [type(part).__name__ for part in mlp.modules() if part is not mlp and _odd(part)]
        own = list(mlp.parameters(recurse=False))
        if odd or own or not any(isinstance(part, nn.Linear) for part in mlp.modules()):
            what = ", ".join(sorted(set(odd))) or "weights of its own"
            raise UserError(
                f"parallel.mlp_tile: {type(mlp).__name__} has {what}, not linear layers"
            )
    if not found:
        raise UserError(f"parallel.mlp_tile: {type(model).__name__} has no FFN called mlp")
    for mlp in found:
        kind: type[nn.Module] = type(mlp)
        mlp.__class__ = _tiled(kind)  # type: ignore[arg-type]  # a class is hashable
        mlp.tile = tile
    return len(found)


def _odd(part: nn.Module) -> bool:
    """Whether a part has weights and is no linear layer."""
    return not isinstance(part, nn.Linear) and bool(list(part.parameters(recurse=False)))


@cache
def _tiled(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_TiledMlp, kind), {"__module__": kind.__module__})


class _TiledMlp(nn.Module):
    """Mixed in before an FFN's class."""

    tile: int

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        if len(flat) <= self.tile:
            out: Tensor = super().forward(x)
            return out
        weights = [p for p in self.parameters() if p.requires_grad]
        whole: Any = _Tiles.apply(  # type: ignore[no-untyped-call]
            super().forward, self.tile, flat, *weights
        )
        result: Tensor = whole.view_as(x)
        return result


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ffn: Any, tile: int, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.ffn, ctx.tile, ctx.weights = ffn, tile, weights
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        for piece, target in zip(x.split(tile), out.split(tile), strict=True):
            target.copy_(ffn(piece))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        wanted: bool = ctx.needs_input_grad[2]
        d_x = torch.empty_like(x) if wanted else None
        sums: list[Tensor] = []
        for start in range(0, len(x), ctx.tile):
            rows = slice(start, start + ctx.tile)
            piece = x[rows].detach().requires_grad_(wanted)
            with torch.enable_grad():
                out = ctx.ffn(piece)
            asked = [piece, *ctx.weights] if wanted else list(ctx.weights)
            found = list(torch.autograd.grad(out, asked, grads[0][rows]))
            if d_x is not None:
                d_x[rows] = found.pop(0)
            if not sums:
                sums = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in found]
            else:
                for total, part in zip(sums, found, strict=True):
                    total.add_(part)
            del out, found
        types = [w.dtype for w in ctx.weights]
        return None, None, d_x, *(g.to(t) for g, t in zip(sums, types, strict=True))
