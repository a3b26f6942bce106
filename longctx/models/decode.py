"""From a prompt to new tokens: prefill in pieces, then transformers' own `generate()`.

The decoder reads the prompt a piece at a time into the model's own cache; `generate()` does the
last piece, sampling and stopping. So the memory of a forward pass does not grow with the prompt,
only the cache does, and the tokens are those of one plain `generate()` call.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

UNFINISHED = "\ufffd"  # how a tokenizer decodes the first bytes of a longer character


class Stream:
    """Takes tokens from `generate()` and writes their text as soon as its characters are whole.

    Args:
        decode: tokens to text, without special tokens.
        write: takes the next piece of text.
        first: called once, when the first new token is there.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        write: Callable[[str], None],
        first: Callable[[], None],
    ) -> None:
        self._decode, self._write, self._first = decode, write, first
        self._start = self._seen = 0
        self._prompt_passed = False
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        """New tokens of the one row; the first call brings the prompt, which is not written."""
        if not self._prompt_passed:
            self._prompt_passed = True
            return
        if not self.tokens:
            self._first()
        self.tokens += value.flatten().tolist()
        self._flush(end=False)

    def end(self) -> None:
        """No more tokens come."""
        self._flush(end=True)

    def _flush(self, end: bool) -> None:
        # A token's text may depend on the one before it (a leading space), not on earlier ones.
        before = self._decode(self.tokens[self._start : self._seen])
        text = self._decode(self.tokens[self._start :])
        if text.endswith(UNFINISHED) and not end:
            return
        self._write(text[len(before) :])
        self._start, self._seen = self._seen, len(self.tokens)


def prefill(
    model: Any, tokens: Tensor, size: int, done: Callable[[int], object], contexts: Any = None
) -> Any:
    """The model's own cache of all tokens but the last `size` or fewer, which `generate()` reads.

    Args:
        model: a decoder with a language-model head.
        tokens: `[1 s]`.
        size: tokens in one forward pass.
        done: called with the number of tokens of each.
        contexts: what an encoder has read; None: the model has none, or nothing to read.

    Returns:
        The cache; None where the tokens fit into one pass.
    """
    cache, decoder = None, model.get_decoder()
    named = {} if contexts is None else contexts.named()
    for start in range(0, tokens.shape[1] - size, size):
        piece = tokens[:, start : start + size]
        out = decoder(input_ids=piece, past_key_values=cache, use_cache=True, **named)
        cache = out.past_key_values
        done(size)
    return cache


@torch.no_grad()
def continue_tokens(
    model: Any,
    tokens: Tensor,
    size: int,
    stream: Stream | None = None,
    done: Callable[[int], object] = lambda count: None,
    contexts: Any = None,
    **settings: Any,
) -> Tensor:
    """The prompt and what follows: the tokens of one `generate()` call, but prefilled in pieces.

    Args:
        model: a decoder with a language-model head.
        tokens: `[1 s]`, on the model's device.
        size: tokens of the prompt in one forward pass.
        stream: gets each new token.
        done: called with the number of tokens of each forward pass before the first new token.
        contexts: what an encoder has read, of a model that takes it; None: nothing.
        **settings: of `generate()`.

    Returns:
        `[1 s+n]`.
    """
    if model.config.rope_parameters["rope_type"] in ("dynamic", "longrope"):
        size = tokens.shape[1]  # their angles depend on the length of the call
    cache = prefill(model, tokens, size, done, contexts)
    if contexts is not None:
        settings["contexts"] = contexts
    mask = torch.ones_like(tokens)  # else prompt tokens that equal the padding token are left out
    out: Tensor = model.generate(
        tokens,
        attention_mask=mask,
        past_key_values=cache,
        streamer=stream,
        use_cache=True,
        num_beams=1,
        **settings,
    )
    return out
