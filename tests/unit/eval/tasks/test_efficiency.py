import pytest
import torch

from longctx.errors import UserError
from longctx.eval.score import evaluating
from longctx.eval.tasks.efficiency import Efficiency, Reading, measure, prompt_of
from longctx.models.load import build_model
from tests.helpers.tiny_cepe import cepe

OWN = Efficiency(2, 3, 2, None, None)
LAYERS, HEADS, SIZE = 3, 2, 8
TINY = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": HEADS,
    "max_position_embeddings": 512,
}  # fmt: skip
SPARSE = {
    "name": "longgen_window", "sink_tokens": 4, "window_tokens": 12, "full_layers": [1],
}  # fmt: skip


def row(model, length, own=OWN):
    with evaluating(model):
        return measure(model, own, length, seed=0)


def test_the_cache_is_counted_to_the_byte():
    found = row(build_model(TINY), 96)
    a_token = LAYERS * 2 * HEADS * SIZE * 4
    # After the prefill, before the new tokens: what the first of them needs.
    assert found["cache_bytes"] == OWN.batch * 96 * a_token
    assert found["encoded"] == 0 and found["length"] == 96
    assert found["prefill_tokens_per_second"] == OWN.batch * 96 / found["prefill_seconds"]
    low, high = found["decode_range"]
    assert 0 < low <= found["decode_seconds"] <= high


def test_a_sparse_cache_is_smaller():
    full, sparse = (row(build_model(TINY, attention=a), 96) for a in ("full", SPARSE))
    assert sparse["cache_bytes"] < 0.6 * full["cache_bytes"]


def test_what_is_timed_is_what_the_model_does():
    """The first token after the prompt and the next are those of one forward over all of it."""
    model = build_model(TINY)
    prompt = prompt_of(model, OWN, 40, seed=3)
    with evaluating(model):
        reading = Reading(model, prompt)
        first = reading.last
        reading.decode()
        whole = model(torch.cat([prompt.tokens, first], dim=1)).logits[:, -2:].argmax(-1)
    assert torch.equal(torch.cat([first, reading.last], dim=1), whole)


def test_an_encoder_reads_what_the_decoder_does_not():
    model = cepe()
    own = Efficiency(1, 2, 1, 24, 8)
    found, short = row(model, 56, own), row(model, 24, own)
    assert (found["encoded"], short["encoded"]) == (32, 0)
    states = 32 * model.config.encoder_config.hidden_size * 8
    assert found["cache_bytes"] == short["cache_bytes"] + states
    prompt = prompt_of(model, own, 56, 0)
    with evaluating(model):
        got = Reading(model, prompt).last
        want = model(prompt.tokens, context_ids=prompt.contexts).logits[:, -1:].argmax(-1)
    assert torch.equal(got, want)
    with pytest.raises(
        UserError, match="lengths=50 is 24 tokens of the decoder and 26 of contexts"
    ):
        prompt_of(model, own, 50, 0)


def test_memory_grows_with_the_length():
    model = build_model(TINY | {"intermediate_size": 4096})
    short, long = (row(model, n, Efficiency(8, 1, 1, None, None)) for n in (64, 512))
    if short["peak_bytes"] is None:
        pytest.skip("this system does not tell a process's peak")
    assert long["peak_bytes"] > 8 * 448 * 4096 * 4 + short["peak_bytes"] // 2
