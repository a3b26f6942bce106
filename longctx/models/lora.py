"""Low-rank adapters, through peft: LongLoRA's set, and merging for the export.

Trains rank * (in + out) numbers per adapted matrix, and the named parameters in full. Those are
trained in place and not through peft's copies, so that tied embeddings stay one tensor.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from longctx.config import AdapterConfig, choice
from longctx.errors import UserError


def add_lora(model: PreTrainedModel, adapter: AdapterConfig, seed: int = 0) -> nn.Module:
    """Adds adapters, freezes the rest, and leaves `also_train` trainable.

    Args:
        model: the pretrained model; its layers are changed in place.
        adapter: `none` gives the model back as it is.
        seed: of the adapters' initialisation, which must be alike on every rank.

    Raises:
        UserError: if a target or a name part matches nothing.

    Source: LoRA (2106.09685); embeddings and norms trained in full, LongLoRA (2309.12307) 3.3.
    """
    choice(adapter.name, ("none", "lora"), "adapter.name")
    if adapter.name == "none":
        return model
    leaves = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for target in adapter.targets:
        if target not in leaves:
            raise UserError(f"adapter.targets: the model has no layer named {target!r}")
    names = [name for name, _ in model.named_parameters()]
    for part in adapter.also_train:
        if not any(part in name for name in names):
            raise UserError(f"adapter.also_train: no parameter has {part!r} in its name")
    if adapter.rank < 1 or not adapter.targets:
        raise UserError("adapter.name=lora needs adapter.rank >= 1 and adapter.targets")
    from peft import LoraConfig, get_peft_model  # seconds, and only needed here

    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        target_modules=list(adapter.targets),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in wrapped.named_parameters():
        if any(part in name for part in adapter.also_train):
            parameter.requires_grad_(True)
    return wrapped


def merge_lora(model: nn.Module) -> nn.Module:
    """The plain model with the adapters added into its matrices; other models unchanged."""
    merge: Any = getattr(model, "merge_and_unload", None)
    merged: nn.Module = merge() if merge else model
    return merged
