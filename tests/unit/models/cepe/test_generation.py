import pytest
import torch

from longctx.models.cepe import cross_attention
from longctx.models.decode import continue_tokens
from tests.helpers.networks import tokens
from tests.helpers.tiny_cepe import cepe, contexts

GREEDY = {"do_sample": False, "max_new_tokens": 3, "pad_token_id": 0}


def counting(model):
    """How many chunks the encoder has read, a number a call."""
    seen = []
    model.encoder.register_forward_pre_hook(
        lambda _, args, named: seen.append(len(named["input_ids"])), with_kwargs=True
    )
    return seen


def by_hand(model, ids, new=3, **context):
    """Greedy, the whole row again for each token."""
    for _ in range(new):
        with torch.no_grad():
            last = model(ids, **context).logits[:, -1]
        ids = torch.cat([ids, last.argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_cached_decoding_is_the_whole_row_again(kind):
    model, ids, chunks = cepe(kind), tokens(2, 6), contexts()
    mask = torch.ones_like(chunks, dtype=torch.bool)
    mask[1, 2, 3:] = False
    seen = counting(model)
    found = model.generate(ids, context_ids=chunks, context_mask=mask, **GREEDY)
    assert seen == [6]
    assert torch.equal(found, by_hand(model, ids, context_ids=chunks, context_mask=mask))
    assert not torch.equal(found, by_hand(model, ids))


def test_logits_of_cached_steps_are_those_of_a_row():
    model, ids, chunks = cepe(), tokens(2, 9), contexts()
    with torch.no_grad():
        read, cache, found = model.encode(chunks), None, []
        for piece in ids.split([4, 1, 3, 1], dim=1):
            out = model(piece, contexts=read, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
        want = model(ids, contexts=read).logits
    assert torch.allclose(torch.cat(found, dim=1), want, atol=1e-5)


def test_few_rows_are_absorbed_and_many_are_not(monkeypatch):
    model, ids, chunks = cepe(), tokens(2, 9), contexts()
    calls = []
    for layer in model.cross_attending():
        for form in ("absorbed", "streamed", "projected"):
            whole = getattr(layer.cross_attn, form)

            def counted(*args, form=form, whole=whole):
                calls.append(form)
                return whole(*args)

            monkeypatch.setattr(layer.cross_attn, form, counted)
    model.generate(ids, context_ids=chunks, **GREEDY)
    assert calls == ["projected"] * 2 + ["absorbed"] * 4
    calls.clear()
    monkeypatch.setattr(cross_attention, "SLAB_BYTES", 2 * 2 * 20 * 16 * 8)  # of 20 states
    model.generate(ids, context_ids=chunks, **GREEDY)
    assert calls == ["streamed"] * 2 + ["absorbed"] * 4
    calls.clear()
    model(ids, context_ids=chunks)
    assert calls == ["projected"] * 2


@pytest.mark.parametrize(
    "settings", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}]
)
def test_beams_read_the_contexts_of_their_row(settings):
    model, ids, chunks = cepe(), tokens(2, 6), contexts()
    seen = counting(model)
    both = model.generate(ids, context_ids=chunks, **GREEDY, **settings)
    assert seen == [6]
    many = len(both) // 2
    for row in range(2):
        own = slice(row, row + 1)
        alone = model.generate(ids[own], context_ids=chunks[own], **GREEDY, **settings)
        assert torch.equal(both[row * many : (row + 1) * many], alone)


def test_left_padded_prompts():
    model, ids, chunks = cepe(), tokens(1, 6), contexts(rows=1)
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(8) >= 2).long()[None]
    found = model.generate(padded, attention_mask=mask, context_ids=chunks, **GREEDY)
    assert torch.equal(found[:, 2:], model.generate(ids, context_ids=chunks, **GREEDY))


def test_new_contexts_join_a_running_generation():
    model, ids, chunks, more = (
        cepe(),
        tokens(2, 4),
        contexts(),
        contexts(chunks=2, length=5, seed=8),
    )
    seen = counting(model)
    with torch.no_grad():
        read = model.encode(chunks)
        out = model.generate(ids, contexts=read, return_dict_in_generate=True, **GREEDY)
        joined = model.append(read, more)
        assert seen == [6, 4]
        row, cache = out.sequences, out.past_key_values
        step = model(row[:, -1:], past_key_values=cache, contexts=joined, use_cache=True).logits
    assert joined.states.shape == (2, 3 * 7 + 2 * 5, 24)
    assert torch.equal(joined.states[:, :21], read.states)
    found = model.generate(row, contexts=joined, **GREEDY)
    assert seen == [6, 4]
    assert found.shape == (2, 10)
    with torch.no_grad():
        old = model(row, contexts=read).logits[:, -1:]
    assert not torch.allclose(step, old, atol=1e-3)


def test_appended_contexts_are_contexts_from_the_start():
    model, ids, chunks = cepe(), tokens(2, 9), contexts()
    mask = torch.ones_like(chunks, dtype=torch.bool)
    mask[0, 2, 4:] = False
    with torch.no_grad():
        for seen in (None, mask):
            parts = [None, None] if seen is None else [seen[:, :1], seen[:, 1:]]
            read = model.encode(chunks[:, :1], parts[0])
            read = model.append(read, chunks[:, 1:], parts[1])
            whole = model(ids, context_ids=chunks, context_mask=seen).logits
            assert (read.mask is None) == (seen is None)
            assert torch.allclose(model(ids, contexts=read).logits, whole, atol=1e-5)


def test_a_prompt_without_contexts_goes_on_as_the_decoder():
    model, ids = cepe(), tokens(1, 6)
    found = continue_tokens(model, ids, 2, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(found, by_hand(model, ids))


def test_a_prefill_in_pieces_takes_encoded_contexts():
    model, ids, chunks = cepe(), tokens(1, 6), contexts(rows=1)
    with torch.no_grad():
        read = model.encode(chunks)
        decoder = model.get_decoder()
        cache = decoder(input_ids=ids[:, :4], use_cache=True, **read.named()).past_key_values
    found = model.generate(ids, past_key_values=cache, contexts=read, **GREEDY)
    assert torch.equal(found, model.generate(ids, context_ids=chunks, **GREEDY))
