"""Another attention for a model that is built already, in place and undone if it does not fit.

Nothing is copied: the configuration gets the method's name, the rotary module its positions. Costs
nothing beside a move to another type or device.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from longctx.errors import UserError
from longctx.models import attach
from longctx.models.export.classes import fit_class
from longctx.models.export.restore import RECORD


def switch(
    model: PreTrainedModel,
    prepared: tuple[PreTrainedConfig, tuple[Tensor, float] | None, Any, str],
    dtype: torch.dtype | None,
    device: str | torch.device | None,
) -> PreTrainedModel:
    """Gives a model the attention that was prepared for it, and moves it.

    Args:
        model: any transformers decoder, from longctx or not; changed in place.
        prepared: a copy of its configuration with the method's numbers, the expected frequencies
            or None, the method, and transformers' name of it.
        dtype: None: as it is.
        device: None: where it is.

    Raises:
        UserError: if the method does not fit the model, which is then as it was.
    """
    config, expected, method, name = prepared
    before = model.config._attn_implementation
    _restore_frequencies(model, expected)
    try:
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            kind = model.config.model_type
            raise UserError(f"the attention of this {kind!r} cannot be exchanged once it is built")
        attach.guard_rotary(model, expected, method)
    except (UserError, RuntimeError, ValueError) as error:
        model.config._attn_implementation = before
        raise UserError(str(error)) from error
    if hasattr(model.config, RECORD):
        delattr(model.config, RECORD)
    if hasattr(config, RECORD):
        setattr(model.config, RECORD, getattr(config, RECORD))
    fit_class(model)
    if dtype is not None:
        model.config.dtype = dtype
        nn.Module.to(model, dtype)
    if device is not None:
        nn.Module.to(model, device)
    return model


def _restore_frequencies(model: PreTrainedModel, expected: tuple[Tensor, float] | None) -> None:
    """Rotary frequencies in fp32 again: `model.to(torch.bfloat16)` of a plain model rounds them."""
    for module in attach.rotary_modules(model):
        built = module.inv_freq
        if expected is not None and built.dtype != torch.float32 and built.device.type != "meta":
            module.inv_freq = expected[0].to(built.device, torch.float32)
