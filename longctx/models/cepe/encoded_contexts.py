"""Contexts of a model: checks them, encodes them in bounded batches, joins them.

One state `[e]` a token is kept, for all decoder layers; the encoder keeps no cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from longctx.errors import UserError

BATCH_TOKENS = 32_768  # context tokens that the encoder reads in one pass


class EncodingRanks(Protocol):
    """Ranks whose tokens see the same contexts: each encodes a part of them."""

    rank: int
    size: int

    def gather(self, part: Tensor) -> Tensor:
        """`[size*k ...]` of the `[k ...]` of each rank; gradients come back as their sum."""
        ...


@runtime_checkable
class ReadsContexts(Protocol):
    """A model whose rows come with contexts.

    Args:
        row_ranks: the ranks that share a row, each of which encodes a part of its contexts. None:
            this rank has rows of its own.
    """

    row_ranks: EncodingRanks | None


@dataclass(frozen=True)
class Contexts:
    """Encoded contexts: the states of all chunks, concatenated.

    Args:
        states: `[b n e]`.
        mask: `[b n]` bool, True on real tokens; None: all are real.
    """

    states: Tensor
    mask: Tensor | None = None

    def named(self) -> dict[str, Tensor | None]:
        """The keyword arguments with which they pass through the decoder."""
        return {"cross_states": self.states, "cross_mask": self.mask}

    def repeated(self, times: int) -> "Contexts":
        """Each row repeated `times` times, for beams and samples."""
        mask = None if self.mask is None else self.mask.repeat_interleave(times, dim=0)
        return Contexts(self.states.repeat_interleave(times, dim=0), mask)


def check(ids: Tensor, mask: Tensor | None, window: int, limit: int) -> None:
    """Raises UserError unless an encoder can read these contexts.

    Args:
        ids: `[b c l]`.
        mask: `[b c l]`, or None.
        window: tokens that the encoder reads at most.
        limit: ids of its vocabulary that a context may hold: 0 to limit - 1.
    """
    if ids.dim() != 3:
        raise UserError(f"context_ids must be [rows, contexts, tokens], not {list(ids.shape)}")
    if mask is not None and mask.shape != ids.shape:
        raise UserError(
            f"contexts of shape {list(ids.shape)} have a mask of shape {list(mask.shape)}: "
            "pad them to one length, and mark real tokens"
        )
    if ids.shape[2] > window:
        raise UserError(
            f"contexts of {ids.shape[2]} tokens, and the encoder reads {window} at a time: "
            "cut them into shorter ones"
        )
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise UserError(f"context_ids must be integers, not {ids.dtype}")
    if ids.numel() and ids.device.type != "meta":
        low, high = (int(x) for x in torch.stack(ids.aminmax()).tolist())
        if low < 0 or high >= limit:
            wrong = low if low < 0 else high
            raise UserError(
                f"context_ids hold {wrong}, and the encoder reads 0 to {limit - 1}: the tokens of "
                "the tokenizer that it was trained with, without the mask token"
            )


def encode(
    encoder: Any,
    ids: Tensor,
    mask: Tensor | None,
    batch_chunks: int | None,
    ranks: EncodingRanks | None = None,
) -> Contexts:
    """Encodes checked contexts, each chunk on its own from position 0.

    Args:
        encoder: a bidirectional model.
        ids: `[b c l]`.
        mask: `[b c l]`, True on real tokens; None: all are real.
        batch_chunks: chunks in one pass. None: `BATCH_TOKENS` tokens of them.
        ranks: those that encode the same contexts together. None: this one alone.
    """
    b, c, length = ids.shape
    if not ids.numel():
        width = encoder.config.hidden_size
        return Contexts(torch.zeros(b, 0, width, dtype=encoder.dtype, device=ids.device))
    real = None if mask is None else mask.bool()
    if real is not None and bool(real.all()):
        real = None
    many = batch_chunks or max(1, BATCH_TOKENS // length)
    chunks = _own(ids.flatten(0, 1), ranks).split(many)
    masks: Sequence[Tensor | None] = [None] * len(chunks)
    if real is not None:
        masks = _own(real.flatten(0, 1), ranks).split(many)
    states = [
        encoder(input_ids=x, attention_mask=m, use_cache=False).last_hidden_state
        for x, m in zip(chunks, masks, strict=True)
    ]
    whole = states[0] if len(states) == 1 else torch.cat(states)
    if ranks is not None:
        whole = ranks.gather(whole)[: b * c]
    return Contexts(whole.reshape(b, c * length, -1), None if real is None else real.flatten(1))


def _own(chunks: Tensor, ranks: EncodingRanks | None) -> Tensor:
    """The chunks of `[n l]` that this rank encodes; every rank gets the same number.

    Where they do not divide evenly the last one is repeated, and its copies are dropped later: all
    ranks must call the encoder equally often under ZeRO 3.
    """
    if ranks is None:
        return chunks
    each = -(-len(chunks) // ranks.size)
    index = torch.arange(ranks.rank * each, ranks.rank * each + each, device=chunks.device)
    return chunks[index.clamp(max=len(chunks) - 1)]


def joined(first: Contexts, second: Contexts) -> Contexts:
    """Both, concatenated row by row."""
    mask = None
    if first.mask is not None or second.mask is not None:
        mask = torch.cat([_mask(first), _mask(second)], dim=1)
    return Contexts(torch.cat([first.states, second.states], dim=1), mask)


def _mask(contexts: Contexts) -> Tensor:
    if contexts.mask is not None:
        return contexts.mask
    states = contexts.states
    return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
