"""The part of a typed run that says which encoder is joined to a decoder, and how.

Values stand in `conf/`; a default is what versions without that setting did.
"""

from dataclasses import dataclass
from typing import Any

from longctx.config.typed import choice, positive


@dataclass(frozen=True)
class EncoderConfig:
    """An encoder that reads contexts for a decoder.

    Args:
        name: `none`, or a short name.
        path: a directory or a hub name. None: random weights.
        architecture: its configuration's fields, the vocabulary with the mask token. Beside a path
            it lets plans be made without the weights.
        made_by: arguments of the run that exports to `path`. None: no run of longctx.
    """

    name: str
    path: str | None
    architecture: dict[str, Any]
    made_by: str | None = None


@dataclass(frozen=True)
class CepeConfig:
    """How an encoder is joined to a frozen decoder, and what of it is trained.

    Args:
        start: an exported CEPE model or a checkpoint of such a run, whose encoder and
            cross-attention training goes on from. None: `encoder`, and `init`.
        init: `zero | copy | normal`, the output projection of a new cross-attention.
        layers: decoder layers with cross-attention, counted from the top. None: all.
        train_encoder: train the encoder too, not only cross-attention.
        made_by: arguments of the run that exports to `start`, on the same model.
    """

    start: str | None = None
    init: str = "zero"
    layers: int | None = None
    train_encoder: bool = True
    made_by: str | None = None

    def __post_init__(self) -> None:
        choice(self.init, ("zero", "copy", "normal"), "cepe.init")
        if self.layers is not None:
            positive(self.layers, "cepe.layers")
