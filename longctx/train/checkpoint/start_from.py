"""Starts from the encoder and cross-attention that an earlier run trained.

The decoder stays the present run's. An export holds one too: the two must be the same model,
compared in bf16, the least that a decoder is stored in. Reads one tensor at a time.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longctx.data.store import DEFINING, tokenizer_sha256
from longctx.errors import UserError
from longctx.models.load import local_tokenizer
from longctx.train.checkpoint.reader import INDEX, open_checkpoint


def take_added(model: Any, start: str) -> None:
    """Copies encoder and cross-attention from an earlier run's model.

    Args:
        model: with `added_parameters()`; changed in place.
        start: a directory: an exported model, or a checkpoint.

    Raises:
        UserError: if there is none, it is incomplete, or was trained with another decoder.
    """
    path = Path(start)
    if not (path / INDEX).is_file() and not any(path.glob("*.safetensors")):
        raise UserError(
            f"cepe.start={start}: no model and no checkpoint there; recipe=cepe_warmup makes one, "
            "and cepe.start=null starts without"
        )
    missing = set(model.added_parameters(True))
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in _weights(path):
            if name not in own or own[name].shape != weight.shape:
                raise UserError(
                    f"cepe.start={start} is of another model: it has {name} {list(weight.shape)}"
                )
            if name in missing:
                own[name].copy_(weight)
                missing.remove(name)
            elif not torch.equal(own[name].bfloat16(), weight.bfloat16()):
                raise UserError(f"cepe.start={start} was trained beside another decoder: {name}")
    if missing:
        raise UserError(f"cepe.start={start} lacks {sorted(missing)[0]} ({len(missing)} in all)")


def require_same_tokenizer(decoder: str | None, others: list[str | None]) -> None:
    """Raises UserError if a directory among `others` has another tokenizer than the decoder.

    Args:
        decoder: where the decoder's tokenizer is. None: not known.
        others: models that were trained with one; hub names and directories without any pass.
    """
    for other in others:
        if decoder is None or other is None or not Path(other).is_dir():
            continue
        if not any((Path(other) / name).is_file() for name in DEFINING):
            continue
        theirs, own = tokenizer_sha256(other), tokenizer_sha256(local_tokenizer(decoder))
        if theirs != own:
            raise UserError(
                f"{other} was trained with tokenizer {theirs[:12]}, but {decoder} has tokenizer "
                f"{own[:12]}: the encoder must read the decoder's tokens"
            )


def _weights(path: Path) -> Iterator[tuple[str, Tensor]]:
    if (path / INDEX).is_file():
        yield from ((name, read()) for name, (_, read) in open_checkpoint(path).weights().items())
        return
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118
                    yield name, shard.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read: {error}") from error
