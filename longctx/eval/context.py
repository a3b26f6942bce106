"""Where a model reads its contexts: in its encoder if it has one, else in front of the prompt.

The one place that decides. A model has an encoder if it has `encode`; it then also has
`hidden_states(tokens, positions, context_ids)`, and its `generate` takes `context_ids` and
`context_mask`. Costs nothing of its own.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn


def has_encoder(model: nn.Module) -> bool:
    """Whether contexts go to an encoder beside the decoder."""
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


def greedy(
    model: nn.Module, prompt: Sequence[int], new_tokens: int, contexts: Sequence[Sequence[int]] = ()
) -> list[int]:
    """The most likely continuation, through the model's own cache; it ends early at an EOS.

    A checkpoint's generation settings (a repetition penalty, beams) change nothing.

    Args:
        model: with transformers' `generate`. Call it inside `longctx.eval.score.evaluating`.
        prompt: tokens.
        new_tokens: at most so many.
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
