"""Where a model runs, and in which type, when the user leaves it open."""

import torch

from longctx.errors import UserError


def device_for(asked: str | None) -> str:
    """The device asked for, or a GPU where there is one.

    Raises:
        UserError: if there is no such device.
    """
    device = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={device}: {str(error).splitlines()[0]}") from error
    return device


def dtype_for(asked: str | None, device: str) -> str:
    """The type asked for, or fp32 on a CPU and bf16 elsewhere."""
    return asked or ("fp32" if device.startswith("cpu") else "bf16")
