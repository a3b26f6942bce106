"""The encoder that a run asks for: stored, of random weights, or its shapes alone.

Costs what `encoder.py` does; shapes alone cost nothing.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from longctx.config.encoder import EncoderConfig
from longctx.errors import UserError
from longctx.models.cepe.encoder import (
    EncoderForMaskedLM,
    build_encoder,
    load_encoder,
    stored_config,
)

TINY = {
    "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "initializer_range": 0.2,
}  # fmt: skip


def build(chosen: EncoderConfig, dtype: str, seed: int, weights: bool = True) -> EncoderForMaskedLM:
    """The encoder in `encoder.path`, else one of random weights; with its head.

    Args:
        chosen: what the run asks for.
        dtype: `fp32 | bf16`.
        seed: of random weights.
        weights: False: they will be loaded from elsewhere, so reading them is skipped if possible.

    Raises:
        UserError: if there is none, or the run does not say what it looks like.
    """
    if chosen.path is not None and (weights or not chosen.architecture):
        _config(chosen.path)
        return load_encoder(chosen.path, dtype)
    if not chosen.architecture:
        raise UserError(
            f"encoder={chosen.name} has no architecture: give encoder=llama2_7b "
            "encoder.architecture.vocab_size=N, N the size of the tokenizer + 1"
        )
    return build_encoder(chosen.architecture, dtype, seed)


def sketch(chosen: EncoderConfig, dtype: str) -> EncoderForMaskedLM:
    """The encoder on the meta device: the architecture of the run, else that in `encoder.path`.

    Args:
        chosen: what the run asks for.
        dtype: `fp32 | bf16`.

    Raises:
        UserError: if there is neither.
    """
    with torch.device("meta"):
        if chosen.architecture or chosen.path is None:
            return build(chosen, dtype, 0, weights=False)
        return build_encoder(_config(chosen.path), dtype)


def tiny(chosen: EncoderConfig, tokens: int, vocab_size: int) -> EncoderConfig:
    """The encoder of a check that trains in a second on a CPU: two layers of random weights.

    Args:
        chosen: what the run asks for; without an encoder it stays so.
        tokens: that it must be able to read at once.
        vocab_size: of the decoder; the mask token is one more.
    """
    if chosen.name == "none":
        return chosen
    sizes = {"vocab_size": vocab_size + 1, "max_position_embeddings": tokens}
    return replace(chosen, path=None, architecture={**TINY, **sizes})


def require_window(encoder: Any, tokens: int, setting: str) -> None:
    """Raises UserError if the encoder cannot read so many tokens at once.

    Args:
        encoder: with a configuration.
        tokens: in one row of the encoder.
        setting: that says so.
    """
    window = encoder.config.max_position_embeddings
    if tokens > window:
        raise UserError(f"{setting}={tokens}, and the encoder reads {window} at a time: lower it")


def _config(path: str) -> Any:
    """The stored configuration; if there is none, the error says which recipe makes it."""
    try:
        return stored_config(path)[0]
    except UserError as error:
        if Path(path).expanduser().exists():
            raise
        # One slash could be a directory or a hub name; the hub's own error says more.
        why = f" ({error})" if path.count("/") == 1 and path[0] not in "./~" else ""
        raise UserError(
            f"encoder.path={path}: nothing there; recipe=cepe_mlm makes one{why}"
        ) from None
