"""The one forward pass that every evaluation uses: hidden states once, logits where scored.

Costs one forward of the decoder per batch. Logits exist for `CHUNK` scored positions at a time,
fewer where the vocabulary is so large that they would be more than `LOGITS` values, never `s x v`:
at 131,072 tokens and 32,000 entries that is 131 MB instead of 16.8 GB, and no more at 256,000. The
softmax is fp32 whatever the model's type.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from longctx.errors import UserError
from longctx.eval.context import states

CHUNK = 1024  # scored positions whose logits exist at once
LOGITS = 1 << 25  # fp32 logits that exist at once, at most: 128 MiB
CAPS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside; the model's mode is restored after."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is."""
    return next(model.parameters()).device


def _head(model: nn.Module) -> nn.Module:
    config = getattr(model, "config", None)
    for key in CAPS:
        if getattr(config, key, None) not in (None, 1.0):
            raise UserError(
                f"{type(model).__name__} rescales its logits ({key}): not supported in evaluation"
            )
    return cast(Callable[[], nn.Module], model.get_output_embeddings)()


def _mask(tokens: Tensor, scored: slice | Tensor) -> Tensor:
    if isinstance(scored, Tensor):
        mask = scored.to(tokens.device)
    else:
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        mask[:, scored] = True
    assert mask.shape == tokens.shape, "the mask marks tokens, so it has their shape"
    assert not mask[:, 0].any(), "nothing predicts the first token, it cannot be scored"
    return mask


def _scored_logits(
    model: nn.Module,
    tokens: Tensor,
    scored: slice | Tensor,
    contexts: Tensor | None = None,
    in_front: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (logits `[n v]` fp32, targets `[n]`) for the scored tokens, chunk by chunk."""
    head, device = _head(model), device_of(model)
    tokens = tokens.to(device)
    mask = _mask(tokens, scored)
    contexts = None if contexts is None else contexts.to(device)
    hidden = states(model, tokens, contexts, in_front)
    # The state at i - 1 predicts token i.  [b s-1 h] -> [n h], row by row
    before, targets = hidden[:, :-1][mask[:, 1:]], tokens[mask]
    del hidden
    entries = getattr(head, "out_features", None) or before.shape[-1]
    size = max(1, min(CHUNK, LOGITS // entries))
    for chunk, target in zip(before.split(size), targets.split(size), strict=True):
        yield head(chunk).float(), target


def token_nll(
    model: nn.Module,
    tokens: Tensor,
    scored: slice | Tensor,
    contexts: Tensor | None = None,
    in_front: bool = False,
) -> Tensor:
    """Negative log-likelihood of the scored tokens, nats.

    Args:
        model: causal language model with `get_decoder()` and `get_output_embeddings()`.
        tokens: `[b s]` int64. Padding may stand on the right: a causal model never sees it.
        scored: which tokens are scored: a slice of the sequence, or a `[b s]` bool mask. Not the
            first token: nothing predicts it.
        contexts: `[b c l]` int64, read by the model's encoder, or in front if it has none.
        in_front: an encoder's model reads them in front too.

    Returns:
        `[n]` fp32 on the CPU, in row-major order of the scored tokens.

    Raises:
        UserError: if the model rescales its logits after the output layer.
    """
    with evaluating(model):
        parts = [
            nn.functional.cross_entropy(logits, targets, reduction="none")
            for logits, targets in _scored_logits(model, tokens, scored, contexts, in_front)
        ]
        return torch.cat(parts).cpu()


def argmax_tokens(model: nn.Module, tokens: Tensor, scored: slice | Tensor) -> Tensor:
    """The most likely token at each scored position, given the true tokens before it.

    Greedy decoding writes a span exactly iff this equals the span: up to the first difference
    both see the same prefix. So exact match costs one forward, no cache and no loop.

    Args:
        model: as in `token_nll`.
        tokens: as in `token_nll`.
        scored: as in `token_nll`.

    Returns:
        `[n]` int64 on the CPU, in row-major order of the scored tokens.
    """
    with evaluating(model):
        parts = [logits.argmax(-1) for logits, _ in _scored_logits(model, tokens, scored)]
        return torch.cat(parts).cpu()
