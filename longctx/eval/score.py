"""How a model is asked: loss or best token at chosen positions, or a greedy continuation.

`token_nll` and `argmax_tokens` cost one forward of the decoder per batch. Logits exist for `CHUNK`
scored positions at a time, fewer where the vocabulary is so large that they would be more than
`LOGITS` values, never `s x v`: at 131,072 tokens and 32,000 entries that is 131 MB instead of
16.8 GB, and no more at 256,000. The softmax is fp32 whatever the model's type.

This file alone decides where contexts are read: in the model's encoder if it has one, else in front
of the prompt. A model has an encoder if it has `encode`; it then also has
`hidden_states(tokens, positions, context_ids)`, and its `generate` takes `context_ids` and
`context_mask`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from longctx.errors import UserError

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


def has_encoder(model: nn.Module) -> bool:
    """Whether the model reads contexts in an encoder."""
    return hasattr(model, "encode")


def context_window(model: nn.Module) -> int | None:
    """Most tokens in one context; None if there is no encoder, and so no such limit."""
    if not has_encoder(model):
        return None
    return int(cast(Any, model.config).encoder_config.max_position_embeddings)


def states(
    model: nn.Module, tokens: Tensor, contexts: Tensor | None, in_front: bool = False
) -> Tensor:
    """Hidden states of the tokens, `[b s h]`, with the contexts read by the encoder or in front.

    Args:
        model: a decoder with `get_decoder()`, with or without an encoder.
        tokens: `[b s]` int64, on the model's device.
        contexts: `[b c l]` int64, all tokens real; None: none.
        in_front: also an encoder's model reads them in its decoder.
    """
    if contexts is not None and has_encoder(model) and not in_front:
        return cast(Callable[..., Tensor], model.hidden_states)(tokens, None, contexts)
    before = 0 if contexts is None else contexts[0].numel()
    if contexts is not None:
        tokens = torch.cat([contexts.flatten(1), tokens], dim=1)
    if (spread := getattr(model, "spread_decoder", None)) is not None:
        return cast(Callable[[Tensor], Tensor], spread)(tokens)[:, before:]
    decoder = cast(Callable[[], nn.Module], model.get_decoder)()
    hidden: Tensor = decoder(input_ids=tokens, use_cache=False).last_hidden_state
    return hidden[:, before:]


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
        tokens: `[b s]` int64. Padding may follow on the right: a causal model never sees it.
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


def greedy(
    model: nn.Module, prompt: Sequence[int], new_tokens: int, contexts: Sequence[Sequence[int]] = ()
) -> list[int]:
    """The most likely continuation, through the model's own cache; it stops early at an EOS.

    A checkpoint's generation settings (a repetition penalty, beams) change nothing.

    Args:
        model: with transformers' `generate`. Call it inside `evaluating`.
        prompt: tokens.
        new_tokens: most tokens of the continuation.
        contexts: tokens of each, of any lengths; only for a model with an encoder.

    Returns:
        The new tokens.
    """
    generate = cast(Callable[..., Tensor], model.generate)
    device = next(model.parameters()).device
    tokens = torch.tensor([list(prompt)], device=device)
    beside: dict[str, Any] = {}
    if contexts:
        assert has_encoder(model), "a decoder alone reads its contexts in the prompt"
        rows = [torch.tensor(list(c), device=device) for c in contexts]
        ones = [torch.ones_like(row, dtype=torch.bool) for row in rows]
        pad = nn.utils.rnn.pad_sequence
        beside["context_ids"] = pad(rows, batch_first=True)[None]
        beside["context_mask"] = pad(ones, batch_first=True)[None]
    out = generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        pad_token_id=0,
        **beside,
    )
    found: list[int] = out[0, len(prompt) :].tolist()
    return found
