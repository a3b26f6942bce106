"""Runs a model on the meta device: operations that read values are replaced by stand-ins.

Shapes, types and what is kept for the backward pass are those of the real model, so counting the
bytes alive while it runs gives the real run's. Costs some microseconds an operation at any length.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

NAME = "longctx_shadow"


class _Attention(torch.autograd.Function):
    """What any fused attention holds: inputs, output, one number a row; then three gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


class _CrossEntropy(torch.autograd.Function):
    """Log probabilities are kept; the gradient with respect to them, and that of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty_like(logits))
        return logits.new_empty(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (known,) = ctx.saved_tensors
        slope = torch.empty_like(known)
        return torch.empty_like(slope)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **rest: Any
) -> tuple[Tensor, None]:
    out: Any = _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2), None


def _no_mask(*args: Any, **named: Any) -> None:
    return None


class Shadow(TorchFunctionMode):
    """A mode in which a model on the meta device runs; every label counts as scored."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Stands in for attention, for selecting rows by a mask, and for questions: yes to all."""
        if func is Tensor.__bool__ and args[0].device.type == "meta":
            return True  # "is all of it real, is it one document?"
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])  # type: ignore[no-untyped-call]
        if func is F.cross_entropy:  # torch's own takes milliseconds without values
            return _CrossEntropy.apply(args[0])  # type: ignore[no-untyped-call]
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor):
            x, mask = args
            if mask.dtype == torch.bool and mask.device.type == "meta":
                rows = torch.arange(mask.numel(), device=x.device)
                return x.flatten(0, mask.dim() - 1).index_select(0, rows)
        return func(*args, **(kwargs or {}))


def cast_shadow(model: nn.Module) -> None:
    """Gives every transformers model inside `model` the attention that needs no values."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _no_mask)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.config._attn_implementation = NAME


def backward(loss: Tensor) -> None:
    """`loss.backward()` inside a `Shadow`, which torch would switch off for its duration."""
    seed = (torch.ones_like(loss),)
    _engine_run_backward((loss,), seed, False, False, (), True, accumulate_grad=True)
