import pytest
import torch

from longctx.errors import UserError
from longctx.eval import score
from tests.helpers.fakes import Fake, noise, unigram


def test_nll_is_the_log_softmax_of_the_previous_position():
    tokens = torch.randint(0, 128, (3, 11), generator=torch.Generator().manual_seed(1))
    model = noise()
    want = torch.log_softmax(model.function(tokens).double(), -1)[:, :-1]
    want = -want.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    got = score.token_nll(model, tokens, slice(4, None))
    torch.testing.assert_close(got.double(), want[:, 3:].flatten(), rtol=1e-6, atol=1e-6)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[0, 1] = mask[2, 10] = mask[2, 3] = True
    got = score.token_nll(model, tokens, mask)
    want = torch.stack([want[0, 0], want[2, 2], want[2, 9]])
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


def test_argmax_is_that_of_the_previous_position():
    tokens = torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(1))
    model = noise()
    want = model.function(tokens).argmax(-1)[:, 5:8].flatten()
    assert torch.equal(score.argmax_tokens(model, tokens, slice(6, 9)), want)


def test_logits_exist_only_for_a_chunk_of_scored_positions(monkeypatch):
    monkeypatch.setattr(score, "CHUNK", 4)
    model = noise()
    tokens = torch.randint(0, 128, (3, 20), generator=torch.Generator().manual_seed(1))
    chunked = score.token_nll(model, tokens, slice(18, None))
    assert model.head.rows == [4, 2]
    monkeypatch.setattr(score, "LOGITS", 0)  # however large the vocabulary, one at a time
    model.head.rows.clear()
    assert torch.equal(chunked, score.token_nll(model, tokens, slice(18, None)))
    assert model.head.rows == [1] * 6
    monkeypatch.undo()
    assert torch.equal(chunked, score.token_nll(model, tokens, slice(18, None)))


def test_softmax_is_fp32_for_a_bf16_model():
    wide = torch.linspace(-3, 3, 128).bfloat16()
    model = Fake(lambda tokens: wide.expand(*tokens.shape, -1))
    got = score.token_nll(model, torch.full((1, 3), 7), slice(1, None))
    want = -torch.log_softmax(wide.double(), -1)[7].expand(2)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


def test_mode_is_restored():
    model = unigram([0.5, 0.5]).train()
    score.token_nll(model, torch.zeros(1, 3, dtype=torch.long), slice(1, None))
    assert model.training
    with pytest.raises(ZeroDivisionError), score.evaluating(model):
        raise ZeroDivisionError
    assert model.training


def test_the_first_token_cannot_be_scored():
    with pytest.raises(AssertionError, match="nothing predicts"):
        score.token_nll(unigram([0.5, 0.5]), torch.zeros(1, 3, dtype=torch.long), slice(0, None))


def test_models_that_rescale_their_logits_are_refused():
    model = unigram([0.5, 0.5])
    model.config = type("Config", (), {"final_logit_softcapping": 30.0})()
    with pytest.raises(UserError, match="final_logit_softcapping"):
        score.token_nll(model, torch.zeros(1, 3, dtype=torch.long), slice(1, None))


def test_nll_is_that_of_transformers_own_logits():
    from longctx.models.load import build_model

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model = build_model({"model_type": "llama", **sizes, **heads})
    tokens = torch.randint(0, 64, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = -torch.log_softmax(model(tokens).logits.double(), -1)[:, :-1]
    want = want.gather(-1, tokens[:, 1:, None]).squeeze(-1)[:, 9:].flatten()
    got = score.token_nll(model, tokens, slice(10, None))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
