"""CEPE models on disk: what `save_pretrained` wrote, read with one-line errors.

Costs one reading of the weights.
"""

from pathlib import Path

import torch
from torch import nn

from longctx.models import load
from longctx.models.cepe.configuration import guard_decoder
from longctx.models.cepe.encoder import guard
from longctx.models.cepe.model import CepeConfig, CepeForCausalLM
from longctx.models.checked import load_checked
from longctx.models.choose import FAILURES, Attention, Dtype, Rope, cannot, locate


def load_cepe(
    path: str | Path,
    attention: Attention = None,
    rope: Rope = None,
    dtype: Dtype = None,
    device: str | torch.device | None = None,
    config: CepeConfig | None = None,
) -> CepeForCausalLM:
    """A whole CEPE model, as `save_pretrained` writes it.

    Args:
        path: a directory, or a hub name.
        attention: of the decoder: a method's name, or a mapping of `name` and its numbers. None: as
            recorded, else full attention.
        rope: scaling of the decoder. None: the checkpoint's own.
        dtype: `fp32 | bf16` or a torch dtype. None: the checkpoint's own.
        device: where to put it. None: CPU.
        config: in place of the one in the directory; then weights may also be a `.bin` of tensors.

    Raises:
        UserError: if it cannot be read, or lacks weights.
    """
    safe = config is None
    if config is None:
        try:
            config = CepeConfig.from_pretrained(locate(str(path))[0])
        except FAILURES as error:
            raise cannot("read the CEPE configuration of", str(path), error) from error
    config.decoder_config, *_ = load._prepare(config.decoder_config, attention, rope, str(path))
    model: CepeForCausalLM = load_checked(CepeForCausalLM, path, config, dtype, safe)
    guard_decoder(model.model)
    guard(model.encoder)
    if device is not None:
        nn.Module.to(model, device)
    return model
