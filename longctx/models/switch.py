"""Gives a built model another attention, in place; undone if it does not fit.

Nothing is copied: the configuration gets the method's name, the rotary module its positions. Costs
nothing except a move to another type or device.
"""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longctx.errors import UserError
from longctx.models import attach
from longctx.models.choose import Attention
from longctx.models.configure import configure
from longctx.models.export.classes import fit_class
from longctx.models.export.restore import RECORD
from longctx.models.files import Dtype, as_dtype


def switch(
    model: PreTrainedModel,
    attention: Attention = None,
    dtype: Dtype = None,
    device: str | torch.device | None = None,
) -> PreTrainedModel:
    """Gives a model another attention, and moves it.

    Args:
        model: any transformers decoder, from longctx or not; changed in place.
        attention: None: what its configuration records, else full attention.
        dtype: `fp32 | bf16` or a torch dtype. None: as it is.
        device: None: where it is.

    Raises:
        UserError: if the method does not fit the model, which is then as it was.
    """
    wanted = None if dtype is None else as_dtype(dtype)
    copied = copy.deepcopy(model.config)
    config, expected, method, name = configure(copied, attention, None, type(model).__name__)
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
    if wanted is not None:
        model.config.dtype = wanted
        nn.Module.to(model, wanted)
    if device is not None:
        nn.Module.to(model, device)
    return model


def _restore_frequencies(model: PreTrainedModel, expected: tuple[Tensor, float] | None) -> None:
    """Rotary frequencies in fp32 again: `model.to(torch.bfloat16)` of a plain model rounds them."""
    for module in attach.rotary_modules(model):
        built = module.inv_freq
        if expected is not None and built.dtype != torch.float32 and built.device.type != "meta":
            module.inv_freq = expected[0].to(built.device, torch.float32)
