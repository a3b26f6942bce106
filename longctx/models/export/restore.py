"""Restores the attention that a checkpoint records while transformers builds the model.

This file and what it imports are copied into exports (`remote.py`), where there is no longctx.
Costs nothing beyond the model's own construction.
"""

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from longctx.attention.method import Method
from longctx.errors import UserError
from longctx.models.attach import guard_rotary, register_attention
from longctx.models.choose import attention_method

RECORD = "longctx_attention"  # its config key for the method's name and numbers
BASE = "longctx_base"  # its config key for the model_type of the stock decoder


def recorded(config: Any) -> Method:
    """The attention method of a configuration, with its numbers; full where it records none."""
    return attention_method(getattr(config, RECORD, None) or "full")


class Restored:
    """Mixed in before a stock decoder class, which stays what it is in all but its attention."""

    def __init_subclass__(cls, **rest: Any) -> None:
        """Lets weights be read as the stock class reads them: transformers goes by the name."""
        super().__init_subclass__(**rest)
        for stock in cls.__mro__:
            if issubclass(stock, PreTrainedModel) and not issubclass(stock, Restored):
                kind: Any = stock.config_class
                found = get_checkpoint_conversion_mapping(stock.__name__)
                found = found or get_checkpoint_conversion_mapping(kind.model_type)
                if found:
                    register_checkpoint_conversion_mapping(cls.__name__, found, overwrite=True)
                return

    def __init__(self, config: PreTrainedConfig, *args: Any, **named: Any) -> None:
        method = recorded(config)
        name, asked = register_attention(method, config), config._attn_implementation
        if asked not in (None, name):
            _keep(asked)
        config._attn_implementation = name
        super().__init__(config, *args, **named)  # type: ignore[call-arg]
        assert isinstance(self, PreTrainedModel)
        with torch.device("cpu"):  # transformers builds on the meta device
            guard_rotary(self, None, method)

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **named: Any) -> None:
        """Takes our attention methods only; what is set up for them does not fit another one."""
        if not str(attn_implementation).startswith("longctx_"):
            _keep(attn_implementation)
        super().set_attn_implementation(  # type: ignore[misc]
            attn_implementation, *args, **named
        )


def _keep(asked: Any) -> None:
    raise UserError(
        f"attn_implementation={asked!r} would replace the attention that belongs to this model: "
        "longctx.load_model(model or path, attention='full') does that"
    )
