"""Models that read contexts, with every probability known, and a pupil who looks answers up."""

import re
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from longctx.eval.journal import Journal
from tests.helpers.fakes import Fake, characters


def bag_logits(vocab: int, tokens: Tensor, contexts: Tensor | None) -> Tensor:
    """p(t) = (1 + times t was seen) / (v + tokens seen): what is in a context stays in memory."""
    counts = nn.functional.one_hot(tokens, vocab).cumsum(1).double()
    if contexts is not None:
        counts += nn.functional.one_hot(contexts.flatten(1), vocab).sum(1, keepdim=True)
    return counts.add(1).log()


def bag(vocab: int) -> Fake:
    """A decoder alone; it knows what stands before, wherever that is."""
    return Fake(lambda tokens: bag_logits(vocab, tokens, None))


class BagWithEncoder(Fake):
    """The same with an encoder: contexts count as if they stood in front."""

    def __init__(self, vocab: int) -> None:
        super().__init__(lambda tokens: bag_logits(vocab, tokens, None))
        self.vocab = vocab
        self.encoded: list[tuple[int, ...]] = []

    def encode(self, context_ids: Tensor) -> None:
        raise AssertionError("evaluation goes through hidden_states")

    def hidden_states(self, tokens: Tensor, positions: None, context_ids: Tensor) -> Tensor:
        assert positions is None
        self.encoded.append(tuple(context_ids.shape))
        return bag_logits(self.vocab, tokens, context_ids)


def bag_nll(scored: np.ndarray, seen: np.ndarray, vocab: int) -> np.ndarray:
    """The same in plain loops: NLL of each scored token behind the tokens seen before it."""
    out, before = [], list(seen)
    for token in scored:
        out.append(-np.log((1 + before.count(token)) / (vocab + len(before))))
        before.append(token)
    return np.array(out)


class Pupil(nn.Module):
    """Answers `What is the code of X?` if it sees `code of X is N`; one token a character.

    It goes on after a newline, as base models do. Without the passage it says `unknown`.
    """

    def __init__(self, window: int, encoder_window: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(max_position_embeddings=window)
        self.calls: list[tuple[str, list[str]]] = []
        if encoder_window is not None:
            self.encode = lambda: None
            encoder = SimpleNamespace(max_position_embeddings=encoder_window)
            self.config.encoder_config = encoder

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        max_new_tokens: int,
        context_ids: Tensor | None = None,
        context_mask: Tensor | None = None,
        **settings: object,
    ) -> Tensor:
        assert settings["do_sample"] is False and not self.training
        assert attention_mask.all() and not torch.is_grad_enabled()
        prompt = "".join(map(chr, input_ids[0].tolist()))
        contexts = []
        if context_ids is not None:
            assert context_mask is not None and context_mask.shape == context_ids.shape
            for ids, real in zip(context_ids[0], context_mask[0], strict=True):
                contexts.append("".join(map(chr, ids[real].tolist())))
        self.calls.append((prompt, contexts))
        asked = re.findall(r"the code of (\w+)\?\nAnswer:", prompt)[-1]
        found = re.search(rf"code of {asked} is (\d+)", prompt + "".join(contexts))
        answer = f" {found[1]}" if found else " unknown"
        more = characters(f"{answer}\n\nDocument")[:max_new_tokens]
        return torch.cat([input_ids, torch.tensor([more])], dim=1)


def subject(model: nn.Module, bos: int | None = None) -> SimpleNamespace:
    """Model and character tokenizer, as tasks take them."""
    return SimpleNamespace(
        model=model,
        encode=characters,
        decode=lambda tokens: "".join(map(chr, tokens)),
        tokenizer=SimpleNamespace(bos_token_id=bos),
        journal=Journal(),
    )


def settings(**fields: object) -> SimpleNamespace:
    """Settings of an evaluation as tasks take them, with those of some tasks."""
    return SimpleNamespace(**fields, task=fields.__getitem__)
