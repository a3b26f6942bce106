"""Models whose every probability is known, and documents in memory, for the evaluation tests."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn


class Fake(nn.Module):
    """A causal model made of a function `tokens [b s] -> logits [b s v]`; counts what it is asked.

    The hidden states are the logits and the output layer copies them.
    """

    def __init__(self, logits: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.function = logits
        self.shapes: list[tuple[int, ...]] = []
        self.head = Head()

    def get_decoder(self) -> nn.Module:
        return self

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache and not self.training and not torch.is_grad_enabled()
        self.shapes.append(tuple(input_ids.shape))
        return SimpleNamespace(last_hidden_state=self.function(input_ids))


class Head(nn.Module):
    """Copies; remembers how many positions it was given at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.rows.append(hidden.shape[0])
        return hidden


def unigram(probabilities: Sequence[float]) -> Fake:
    """The next token's probabilities do not depend on anything."""
    logits = torch.tensor(probabilities, dtype=torch.float64).log().float()
    return Fake(lambda tokens: logits.expand(*tokens.shape, -1))


def by_position() -> Fake:
    """Two tokens; after p tokens token 0 has NLL `position_nll(p)`: shows the context's length."""

    def logits(tokens: Tensor) -> Tensor:
        p = torch.arange(1, tokens.shape[1] + 1).expand(tokens.shape)
        return torch.stack([(p * 0.01).float(), torch.zeros(tokens.shape)], -1)

    return Fake(logits)


def position_nll(p: int | np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(-0.01 * np.asarray(p, dtype=np.float64)))


GRAM = "pass key is"


def characters(text: str) -> list[int]:
    """A tokenizer of one token a character."""
    return [ord(c) for c in text]


def copier(sees: int | None = None) -> Fake:
    """Continues the last earlier place with the same `len(GRAM)` characters, if it sees it.

    Args:
        sees: it sees only so many of the last tokens; None: all.
    """

    def logits(tokens: Tensor) -> Tensor:
        out = torch.zeros(*tokens.shape, 128)
        for row, ids in enumerate(tokens.tolist()):
            text = "".join(map(chr, ids))
            for i in range(len(GRAM), len(text)):
                view = text[max(0, i + 1 - sees) : i + 1] if sees else text[: i + 1]
                at = view[:-1].rfind(view[-len(GRAM) :])
                if at >= 0:
                    out[row, i, ord(view[at + len(GRAM)])] = 10
        return out

    return Fake(logits)


def noise() -> Fake:
    """Arbitrary but fixed predictions."""

    def logits(tokens: Tensor) -> Tensor:
        return torch.randn(*tokens.shape, 128, generator=torch.Generator().manual_seed(0))

    return Fake(logits)


class Memory:
    """Documents in memory, read like a store."""

    def __init__(self, documents: Sequence[Sequence[int]]) -> None:
        self.documents = [np.array(d, dtype=np.uint16) for d in documents]
        self.lengths = np.array([len(d) for d in documents], dtype=np.int64)

    def tokens(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.documents[i][start:stop]
