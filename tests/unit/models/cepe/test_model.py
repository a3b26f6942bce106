import copy

import pytest
import torch

from longctx.batch import IGNORE
from longctx.errors import UserError
from longctx.models.cepe import encoded_contexts as encoded
from longctx.models.cepe.checkpoints import load_cepe
from longctx.models.cepe.model import CepeConfig, CepeForCausalLM, Contexts
from longctx.models.load import build_model, load_model
from longctx.train.loss import chunked_cross_entropy
from tests.helpers.networks import network, tokens
from tests.helpers.tiny_cepe import ENCODER, cepe, contexts, encoder, shake

KINDS = ["llama", "mistral", "qwen2", "qwen3"]
NEAR = {"atol": 1e-5, "rtol": 1e-5}  # norms run in fp32, also in a float64 model


def logits(model, ids, *args, **named):
    with torch.no_grad():
        return model(ids, *args, **named).logits


def half_padded(ids):
    """The last tokens of every second chunk are not real."""
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, ::2, ids.shape[2] // 2 :] = False
    return mask


# --- exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_without_context_it_is_the_decoder(kind):
    ids, base = tokens(2, 9), network(kind)
    model = cepe(kind)
    assert torch.equal(logits(model, ids), logits(base, ids))
    none = torch.zeros(2, 0, 7, dtype=torch.long)
    assert torch.equal(logits(model, ids, context_ids=none), logits(base, ids))


@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_output_projection_is_the_decoder(kind):
    ids = tokens(2, 9)
    found = logits(cepe(kind, init="zero"), ids, context_ids=contexts())
    assert torch.equal(found, logits(network(kind), ids))


def test_a_copied_start_is_not_the_decoder():
    ids, decoder = tokens(2, 9), network()
    base = logits(decoder, ids)
    model = CepeForCausalLM.from_parts(decoder, encoder(), init="copy")
    assert (logits(model, ids, context_ids=contexts()) - base).abs().max() > 0.1
    for layer in model.model.layers:
        own, cross = layer.self_attn, layer.cross_attn
        assert torch.equal(cross.q_proj.weight, own.q_proj.weight)
        assert torch.equal(cross.k_proj.weight, own.k_proj.weight[:, :24])
        assert torch.equal(cross.v_proj.weight, own.v_proj.weight[:, :24])
        assert torch.equal(cross.o_proj.weight, own.o_proj.weight)
        assert torch.equal(cross.layernorm.weight, layer.post_attention_layernorm.weight)


@pytest.mark.parametrize("masked", [False, True])
def test_the_order_of_chunks_does_not_matter(masked):
    model, ids, order = cepe(), tokens(2, 9), torch.tensor([2, 0, 1])
    chunks = contexts()
    mask = half_padded(chunks) if masked else None
    moved = None if mask is None else mask[:, order]
    want = logits(model, ids, context_ids=chunks, context_mask=mask)
    found = logits(model, ids, context_ids=chunks[:, order], context_mask=moved)
    assert torch.allclose(found, want, **NEAR)
    inside = logits(model, ids, context_ids=chunks.flip(2))
    assert not torch.allclose(inside, want, atol=1e-2)  # rope stands inside a chunk


def test_the_order_of_states_does_not_matter():
    model, ids = cepe(), tokens(2, 9)
    with torch.no_grad():
        states = model.encode(contexts()).states
    order = torch.randperm(states.shape[1], generator=torch.Generator().manual_seed(0))
    want = logits(model, ids, contexts=Contexts(states))
    assert torch.allclose(logits(model, ids, contexts=Contexts(states[:, order])), want, **NEAR)


def test_the_context_twice_is_the_context():
    model, ids, chunks = cepe(), tokens(2, 9), contexts()
    want = logits(model, ids, context_ids=chunks)
    twice = logits(model, ids, context_ids=torch.cat([chunks, chunks], dim=1))
    assert torch.allclose(twice, want, **NEAR)


def test_masked_chunks_and_pad_ids_change_nothing():
    model, ids, chunks = cepe(), tokens(2, 9), contexts()
    mask = half_padded(chunks)
    want = logits(model, ids, context_ids=chunks, context_mask=mask)
    other = torch.where(mask, chunks, 7)
    assert torch.allclose(logits(model, ids, context_ids=other, context_mask=mask), want, **NEAR)
    more = torch.cat([chunks, contexts(chunks=2, seed=9)], dim=1)
    wider = torch.cat([mask, torch.zeros(2, 2, 7, dtype=torch.bool)], dim=1)
    assert torch.allclose(logits(model, ids, context_ids=more, context_mask=wider), want, **NEAR)
    assert not torch.allclose(logits(model, ids, context_ids=chunks), want, atol=1e-2)


@pytest.mark.parametrize("grad", [False, True])
def test_a_context_without_a_real_token_contributes_nothing(grad):
    model, ids = cepe(), tokens(2, 9)
    nothing = torch.zeros(2, 3, 7, dtype=torch.bool)
    nothing[1] = True
    base = logits(network(), ids)
    with torch.set_grad_enabled(grad):
        found = model(ids, context_ids=contexts(), context_mask=nothing).logits.detach()
    assert torch.equal(found[0], base[0])
    assert not torch.allclose(found[1], base[1], atol=1e-2)


def test_chunks_are_encoded_by_themselves():
    model, chunks = cepe(), contexts()
    with torch.no_grad():
        whole = model.encode(chunks).states.view(2, 3, 7, -1)
        few = model.encode(chunks, batch_chunks=2).states.view(2, 3, 7, -1)
        alone = model.encode(chunks[:, 1:2]).states
        other = chunks.clone()
        other[0, 1, 3] = 1 + chunks[0, 1, 3] % 60
        changed = model.encode(other).states.view(2, 3, 7, -1)
    assert torch.allclose(few, whole, **NEAR)
    assert torch.allclose(alone, whole[:, 1], **NEAR)
    differs = (changed - whole).abs().amax((2, 3)) > 1e-4
    assert differs.tolist() == [[False, True, False], [False, False, False]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_is_the_same(side):
    model, ids, chunks = cepe(), tokens(2, 9), contexts()
    pad = torch.full((2, 3, 4), 2)
    real, no = torch.ones_like(chunks, dtype=torch.bool), torch.zeros_like(pad, dtype=torch.bool)
    order = (slice(None, None, -1),) if side == "left" else (slice(None),)
    padded = torch.cat([chunks, pad][order[0]], dim=2)
    mask = torch.cat([real, no][order[0]], dim=2)
    found = logits(model, ids, context_ids=padded, context_mask=mask)
    assert torch.allclose(found, logits(model, ids, context_ids=chunks), **NEAR)


def test_who_sees_what():
    model, ids, chunks = cepe(), tokens(1, 9), contexts(rows=1)
    want = logits(model, ids, context_ids=chunks)
    later = ids.clone()
    later[0, 6] = 1 + ids[0, 6] % 60
    found = logits(model, later, context_ids=chunks)
    assert torch.allclose(found[:, :6], want[:, :6], **NEAR)
    assert not torch.allclose(found[:, 6], want[:, 6], atol=1e-2)
    last = chunks.clone()
    last[0, -1, -1] = 1 + chunks[0, -1, -1] % 60
    moved = (logits(model, ids, context_ids=last) - want).abs().amax(-1)
    assert bool((moved > 1e-4).all())


def test_contexts_consume_no_positions():
    model, ids, seen = cepe(), tokens(2, 9), []
    hook = model.model.rotary_emb.register_forward_pre_hook(
        lambda _, args, named: seen.append(named["position_ids"].tolist()), with_kwargs=True
    )
    for chunks in (None, contexts(chunks=1), contexts(chunks=5)):
        logits(model, ids, context_ids=chunks)
    hook.remove()
    assert seen == [[list(range(9))]] * 3


def test_shapes():
    model, chunks = cepe(), contexts(2, 3, 5)
    read = model.encode(chunks)
    assert read.states.shape == (2, 15, 24)
    assert read.mask is None
    assert model.encode(chunks, half_padded(chunks)).mask.shape == (2, 15)
    assert model.hidden_states(tokens(2, 9), None, chunks, None).shape == (2, 9, 32)
    assert logits(model, tokens(2, 9), context_ids=chunks, logits_to_keep=2).shape == (2, 2, 64)


def test_layers_are_counted_from_the_top():
    model = cepe(cross_layers=1)
    names = list(model.added_parameters(train_encoder=False))
    assert names == [
        f"model.layers.1.cross_attn.{n}.weight"
        for n in ("layernorm", "q_proj", "k_proj", "v_proj", "o_proj")
    ]
    every = model.added_parameters()
    assert every.keys() - set(names) == {
        n for n, _ in model.named_parameters() if n[:8] == "encoder."
    }
    assert not torch.allclose(
        logits(model, tokens(2, 9), context_ids=contexts()),
        logits(network(), tokens(2, 9)),
        atol=0.1,
    )
    for wrong in (0, 3):
        with pytest.raises(UserError, match=f"cross_layers={wrong} must be 1 to 2"):
            cepe(cross_layers=wrong)


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_checkpointing_changes_no_gradient(masked):
    chunks, ids = contexts(), tokens(2, 9)
    mask = half_padded(chunks) if masked else None
    found = []
    for checkpointing in (False, True):
        model = cepe("mistral").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for name, weight in model.named_parameters():
            weight.requires_grad_(name in model.added_parameters())
        hidden = model.hidden_states(ids, None, chunks, mask)
        labels = torch.cat([ids[:, 1:], torch.full((2, 1), IGNORE)], dim=1)
        total, _ = chunked_cross_entropy(hidden, model.get_output_embeddings(), labels)
        total.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    plain, recomputed = found
    assert plain.keys() == recomputed.keys() == cepe("mistral").added_parameters().keys()
    for name, grad in plain.items():
        assert torch.equal(grad, recomputed[name]), name
        assert grad.abs().max() > 0, name


def test_the_first_step_moves_the_output_projection_alone():
    model = cepe(init="zero").train()
    labels = tokens(2, 9)
    model(labels, context_ids=contexts(), labels=labels).loss.backward()
    for name, weight in model.added_parameters().items():
        moves = bool(weight.grad.abs().max() > 0)
        assert moves == name.endswith("cross_attn.o_proj.weight"), name


def test_the_loss_is_that_of_the_decoders_tokens():
    model, ids, chunks = cepe(), tokens(2, 9), contexts()
    labels = ids.clone()
    labels[0, :4] = IGNORE
    out = model(ids, context_ids=chunks, labels=labels)
    targets = torch.cat([labels[:, 1:], torch.full((2, 1), IGNORE)], dim=1)
    hidden = model.hidden_states(ids, None, chunks)
    total, count = chunked_cross_entropy(hidden, model.get_output_embeddings(), targets)
    assert int(count) == 5 + 8
    assert float(out.loss.detach()) == pytest.approx(float((total / count).detach()), rel=1e-6)


# --- counts ---------------------------------------------------------------------------------------


def test_parameters_at_7b():
    decoder = build_model(
        {"model_type": "llama", "vocab_size": 32000, "intermediate_size": 11008}, meta=True
    )
    sizes = {"vocab_size": 32001, "hidden_size": 1024, "intermediate_size": 4096}
    sizes |= {"num_hidden_layers": 24, "num_attention_heads": 16, "max_position_embeddings": 512}
    with torch.device("meta"):
        model = CepeForCausalLM.from_parts(decoder, encoder(**sizes))
    count = {n: p.numel() for n, p in model.named_parameters()}
    added = model.added_parameters()
    layer = sum(n for name, n in count.items() if name.startswith("model.layers.7.cross_attn."))
    assert layer == 2 * 4096**2 + 2 * 1024 * 4096 + 4096 == 41_947_136
    assert sum(n for name, n in count.items() if name.startswith("encoder.")) == 435_472_384
    assert sum(p.numel() for p in added.values()) == 1_777_780_736
    assert sum(count.values()) == 8_516_196_352


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", [None, {"name": "dca", "chunk_len": 4, "local_window": 2}])
def test_saved_and_loaded(kind, attention, tmp_path):
    model, ids, chunks = (
        cepe(kind, attention=attention, tie_word_embeddings=True),
        tokens(2, 9),
        contexts(),
    )
    model.config.decoder_config.eos_token_id = 3
    want = logits(model, ids, context_ids=chunks)
    model.save_pretrained(tmp_path)
    for again in (load_cepe(tmp_path), CepeForCausalLM.from_pretrained(tmp_path)):
        assert again.dtype == again.encoder.dtype == torch.float64
        assert torch.equal(logits(again.eval(), ids, context_ids=chunks), want)
        assert again.lm_head.weight is again.model.embed_tokens.weight
        assert again.config.to_dict() == again.config.from_dict(again.config.to_dict()).to_dict()
        assert again.config.mask_token_id == 64
        assert again.model.config._attn_implementation == model.model.config._attn_implementation
        assert again.encoder.config._attn_implementation == "longctx_bidirectional"
    half = load_cepe(tmp_path, dtype="bf16")
    assert half.dtype == torch.bfloat16
    for rotary in (half.model.rotary_emb, half.encoder.rotary_emb):
        assert rotary.inv_freq.dtype == torch.float32
    full = load_cepe(tmp_path, attention="full").eval()
    plain = cepe(kind, tie_word_embeddings=True)
    assert torch.equal(
        logits(full, ids, context_ids=chunks), logits(plain, ids, context_ids=chunks)
    )
    assert attention is None or not torch.allclose(want, logits(plain, ids, context_ids=chunks))


def test_load_model_knows_it(tmp_path):
    model, ids, chunks = cepe(), tokens(2, 9), contexts()
    model.save_pretrained(tmp_path)
    dca = {"name": "dca", "chunk_len": 4}
    want = logits(cepe(attention=dca), ids, context_ids=chunks)
    for again in (load_model(tmp_path, attention=dca), load_model(model, attention=dca)):
        assert isinstance(again, CepeForCausalLM)
        assert torch.equal(logits(again.eval(), ids, context_ids=chunks), want)
        assert again.config.decoder_config.longctx_attention["chunk_len"] == 4
        assert again.encoder.config._attn_implementation == "longctx_bidirectional"
    scaled = load_model(tmp_path, rope={"name": "pi", "factor": 2.0})
    assert scaled.config.max_position_embeddings == 2 * network().config.max_position_embeddings
    whole, half = (m.model.rotary_emb.inv_freq for m in (model, scaled))
    assert torch.allclose(half, whole / 2)
    assert torch.equal(scaled.encoder.rotary_emb.inv_freq, model.encoder.rotary_emb.inv_freq)
    load_model(model, dtype="bf16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16


def test_weights_that_are_not_there_are_refused(tmp_path):
    model = cepe()
    model.save_pretrained(tmp_path)
    config = CepeConfig.from_pretrained(tmp_path)
    config.encoder_config.num_hidden_layers = 3
    with pytest.raises(UserError, match=r"lacks weights .*encoder.layers.2") as error:
        load_cepe(tmp_path, config=config)
    assert "\n" not in str(error.value)
    config = CepeConfig.from_pretrained(tmp_path)
    config.decoder_config.head_dim = 16  # a decoder with another head size
    with pytest.raises(
        UserError, match=r"another model than its configuration: .*k_proj.* \[16, 24\] there"
    ) as error:
        load_cepe(tmp_path, config=config)
    assert "\n" not in str(error.value)
    config = CepeConfig.from_pretrained(tmp_path)
    config.cross_layers = 1
    with pytest.raises(UserError, match=r"has the unknown weights .*layers.0.cross_attn"):
        load_cepe(tmp_path, config=config)


def test_a_copy_is_a_model_of_its_own():
    model, ids, chunks = cepe(), tokens(2, 9), contexts()
    other = copy.deepcopy(model)
    want = logits(model, ids, context_ids=chunks)
    shake(other, seed=8)
    assert torch.equal(logits(model, ids, context_ids=chunks), want)
    assert not torch.allclose(logits(other, ids, context_ids=chunks), want, atol=1e-2)


def test_another_attention_is_the_decoders_alone():
    model = cepe()
    model.set_attn_implementation("eager")
    assert model.model.config._attn_implementation == "eager"
    assert model.encoder.config._attn_implementation == "longctx_bidirectional"


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "mask", "words"),
    [
        (contexts(length=17), None, "contexts of 17 tokens, and the encoder reads 16"),
        (contexts().flatten(1), None, r"must be \[rows, contexts, tokens\], not \[2, 21\]"),
        (contexts(), torch.ones(2, 3, 6), r"shape \[2, 3, 7\] have a mask of shape \[2, 3, 6\]"),
        (contexts() * 0 + 64, None, "hold 64, and the encoder reads 0 to 63"),
        (contexts() * 0 + 99, None, "hold 99"),
        (contexts() * 0 - 1, None, "hold -1"),
        (contexts().double(), None, "integers"),
        (contexts(rows=3), None, "2 rows of tokens have 3 rows of contexts"),
    ],
)
def test_contexts_that_do_not_fit(ids, mask, words):
    with pytest.raises(UserError, match=words) as error:
        cepe()(tokens(2, 9), context_ids=ids, context_mask=mask)
    assert "\n" not in str(error.value)


def test_contexts_given_twice_or_for_other_rows():
    model, chunks = cepe(), contexts()
    read = model.encode(chunks)
    with pytest.raises(UserError, match="give contexts once"):
        model(tokens(2, 9), context_ids=chunks, contexts=read)
    with pytest.raises(UserError, match="2 rows of contexts"):
        model.append(read, contexts(rows=3))
    with pytest.raises(UserError, match="needs the tokens of a prompt"):
        model.generate(context_ids=chunks, max_new_tokens=1)


def test_a_causal_encoder_is_refused():
    with pytest.raises(UserError, match="build_encoder or load_encoder"):
        CepeForCausalLM.from_parts(network(), network().model)


def test_a_plain_encoder_of_the_decoders_vocabulary_has_no_mask_token():
    inner = encoder(vocab_size=64).encoder
    assert CepeForCausalLM.from_parts(network(), inner).config.mask_token_id is None
    assert CepeForCausalLM.from_parts(network(), encoder().encoder).config.mask_token_id == 64


# --- memory ---------------------------------------------------------------------------------------


def test_what_is_kept_of_a_context_is_its_states(monkeypatch):
    model, chunks, widths = cepe(), contexts(2, 6, 8), []
    whole = model.encoder.forward

    def counted(*args, **named):
        out = whole(*args, **named)
        assert out.past_key_values is None
        assert out.hidden_states is None
        widths.append(named["input_ids"].numel())
        return out

    monkeypatch.setattr(model.encoder, "forward", counted)
    monkeypatch.setattr(encoded, "BATCH_TOKENS", 24)
    with torch.no_grad():
        read = model.encode(chunks)
        out = model(tokens(2, 9), contexts=read, use_cache=True)
    assert widths == [24, 24, 24, 24]
    assert read.states.untyped_storage().nbytes() == 2 * 48 * 24 * 8  # rows, tokens, e, bytes
    assert {k for k, v in vars(read).items() if v is not None} == {"states"}
    cached = sum(x.keys.numel() + x.values.numel() for x in out.past_key_values.layers)
    assert cached == 2 * 2 * 9 * 2 * 2 * 8  # keys and values, rows, tokens, layers, key heads, d
    held = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Contexts)]
    assert held == []
    kept = [
        x
        for m in model.modules()
        for x in (*vars(m).values(), *dict(m.named_buffers(recurse=False)).values())
        if isinstance(x, torch.Tensor) and 48 in x.shape
    ]
    assert kept == []


def test_no_chunk_by_chunk_mask_is_built(monkeypatch):
    model, chunks, shapes = cepe(), contexts(2, 3, 8), []
    whole = torch.nn.functional.scaled_dot_product_attention

    def counted(query, key, value, attn_mask=None, **named):
        shapes.append(None if attn_mask is None else tuple(attn_mask.shape))
        return whole(query, key, value, attn_mask=attn_mask, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    model.encode(chunks, half_padded(chunks))
    assert shapes == [(6, 1, 1, 8)] * 2
    assert ENCODER["num_hidden_layers"] == 2
