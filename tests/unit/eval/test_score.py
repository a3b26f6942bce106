import pytest
import torch

from longctx.errors import UserError
from longctx.eval import score
from longctx.eval.score import context_window, evaluating, greedy, has_encoder, states, token_nll
from longctx.models.cepe.encoder import build_encoder
from longctx.models.cepe.model import CepeForCausalLM
from longctx.models.load import build_model
from tests.helpers.fakes import Fake, noise, unigram
from tests.helpers.reading import BagWithEncoder, Pupil, bag

TOKENS = torch.randint(0, 7, (2, 9), generator=torch.Generator().manual_seed(0))
CONTEXTS = torch.randint(0, 7, (2, 3, 4), generator=torch.Generator().manual_seed(1))
SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "max_position_embeddings": 64}


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


# --- where contexts are read ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def cepe():
    """A tiny real model whose cross-attention does something."""
    decoder = build_model({"model_type": "llama", "num_key_value_heads": 1, **SIZES, **HEADS})
    encoder = build_encoder({**SIZES, **HEADS, "vocab_size": 41, "hidden_size": 16})
    return CepeForCausalLM.from_parts(decoder, encoder, init="copy").eval()


def test_a_decoder_reads_contexts_in_front():
    model = bag(7)
    joined = torch.cat([CONTEXTS.flatten(1), TOKENS], 1)
    with evaluating(model):
        got = states(model, TOKENS, CONTEXTS)
        assert torch.equal(got, model.function(joined)[:, 12:])
        assert torch.equal(states(model, TOKENS, None), model.function(TOKENS))
    assert model.shapes == [(2, 21), (2, 9)]


def test_an_encoder_reads_them_unless_told_otherwise():
    model = BagWithEncoder(7)
    with evaluating(model):
        states(model, TOKENS, CONTEXTS)
        assert model.encoded == [(2, 3, 4)] and model.shapes == []
        states(model, TOKENS, CONTEXTS, in_front=True)
        states(model, TOKENS, None)
    assert model.encoded == [(2, 3, 4)] and model.shapes == [(2, 21), (2, 9)]


def test_nll_with_contexts_is_that_of_its_states():
    model = noise()
    joined = torch.cat([CONTEXTS.flatten(1), TOKENS], 1)
    want = token_nll(model, joined, slice(12 + 4, None))
    assert torch.equal(token_nll(model, TOKENS, slice(4, None), CONTEXTS), want)


def test_greedy_hands_passages_of_unequal_length_over_with_their_mask():
    model = Pupil(1000, 100)
    prompt = [ord(c) for c in "What is the code of X?\nAnswer:"]
    texts = ["code of Y is 3", "the code of X is 12345"]
    with evaluating(model):
        new = greedy(model, prompt, 4, [[ord(c) for c in text] for text in texts])
    assert "".join(map(chr, new)) == " 123"
    assert model.calls[0][1] == texts


def test_a_decoder_alone_takes_no_contexts_beside_its_prompt():
    with pytest.raises(AssertionError, match="in the prompt"):
        greedy(Pupil(1000), [1], 4, [[2]])


def test_window_of_an_encoder():
    assert context_window(Pupil(1000)) is None
    assert context_window(Pupil(1000, 77)) == 77


def test_a_real_model_reads_contexts_in_its_encoder(cepe):
    assert has_encoder(cepe) and context_window(cepe) == 64
    tokens, contexts = TOKENS[:1] + 5, CONTEXTS[:1] + 5
    with torch.no_grad():
        logits = cepe(input_ids=tokens, context_ids=contexts).logits
    want = -torch.log_softmax(logits, -1)[:, 3:-1].gather(-1, tokens[:, 4:, None]).flatten()
    got = token_nll(cepe, tokens, slice(4, None), contexts)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    alone = token_nll(cepe, tokens, slice(4, None))
    assert (alone - got).abs().max() > 1e-3
    with evaluating(cepe):
        new = greedy(cepe, tokens[0].tolist(), 3, contexts[0].tolist())
        step = cepe(input_ids=tokens, context_ids=contexts).logits[0, -1].argmax()
    assert new[0] == step and len(new) <= 3


def test_greedy_is_greedy_whatever_the_checkpoint_s_generation_settings():
    model = build_model({"model_type": "llama", "num_key_value_heads": 1, **SIZES, **HEADS}).eval()
    model.generation_config.update(repetition_penalty=9.0, num_beams=3, no_repeat_ngram_size=1)
    read = [3, 5, 7]
    with evaluating(model):
        new = greedy(model, read, 6)
        for _ in range(6):
            read.append(int(model(torch.tensor([read])).logits[0, -1].argmax()))
    assert new == read[3:]
