"""Ways for a model to train in less memory: see `ParallelConfig` and docs/memory.md.

Activation checkpointing keeps each layer's input `[b t h]` and computes the rest again in the
backward pass: one more forward. With the inputs in CPU memory a GPU holds only the current layer's;
they cross the bus twice, on the compute stream (so the copies are not hidden).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from longctx.config import ParallelConfig
from longctx.models.tiled_mlp import tile_mlps


def spare(model: Any, parallel: ParallelConfig) -> None:
    """Switches on what `parallel` asks for; the results stay the same.

    Args:
        model: of transformers.
        parallel: what to save, and how.

    Raises:
        UserError: if the model's FFN cannot be tiled.
    """
    if parallel.activation_checkpointing:
        # The name in transformers 5.23; earlier ones have the second only.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable = next(getattr(model, name) for name in names if hasattr(model, name))
        enable({"use_reentrant": False})
    if parallel.offload_checkpoints:
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = checkpoint_on_cpu
    if parallel.mlp_tile:
        tile_mlps(model, parallel.mlp_tile)


def checkpoint_on_cpu(layer: Any, *inputs: Any) -> Any:
    """`torch.utils.checkpoint`, with the tensors it keeps in CPU memory.

    Non-reentrant checkpointing saves its positional inputs as autograd saves a tensor, and nothing
    inside the layer: its own hooks stand further in than these.

    Args:
        layer: what to run, and again in the backward pass.
        inputs: of it; what travels as keyword arguments inside `layer` is shared by all layers and
            stays where it is.
    """
    with saved_tensors_hooks(_Kept, _Kept.back):
        return checkpoint(layer, *inputs, use_reentrant=False)


class _Kept:
    """A tensor in (page-locked) CPU memory; one of a sketch leaves nothing, one on CPU itself."""

    def __init__(self, x: Tensor) -> None:
        self.device, self.dtype, self.shape = x.device, x.dtype, x.shape
        self.copy: Tensor | None = None
        if x.device.type == "cuda":
            self.copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self.copy.copy_(x, non_blocking=True)  # its memory is reused on the same stream
        elif x.device.type == "cpu":
            self.copy = x

    def back(self) -> Tensor:
        """The tensor where it was."""
        if self.copy is None:
            return torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return self.copy.to(self.device, non_blocking=True)
