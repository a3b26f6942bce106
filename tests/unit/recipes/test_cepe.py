"""CEPE's recipes, step by step in plain torch: what trains, what is scored, where they start."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from longctx import cli
from longctx.batch import IGNORE
from longctx.config import RunConfig
from longctx.data.store import StoreWriter, tokenizer_sha256
from longctx.errors import UserError
from longctx.models.cepe.model import CepeForCausalLM
from longctx.models.export.directory import export
from longctx.models.load import load_model
from longctx.recipes import cepe, cepe_mlm
from longctx.train.optim import adamw, learning_rate
from tests.helpers.cepe import cepe_run, make_decoder
from tests.helpers.tiny import make_store


@pytest.fixture(scope="module")
def place(tmp_path_factory, lab_model):
    path = tmp_path_factory.mktemp("cepe")
    make_decoder(path / "decoder", lab_model)
    make_store(path / "store", few=True, tokenizer=tokenizer_sha256(lab_model))
    return path


def tiny(place, recipe, *more):
    return cepe_run(recipe, place / "decoder", place / "store", place / "run", *more)


def step(recipe, run, model, batch, optimizer=None):
    """Gradients of one step by name; None where there is none."""
    model.zero_grad()
    total, count = recipe.RECIPE.loss(run, model, batch)
    (total / count).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if optimizer is not None:
        optimizer.step()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("train_encoder", [True, False])
def test_only_what_was_added_trains(place, train_encoder):
    """Check: decoder bit for bit as before; cross-attention with its norm, and encoder, change."""
    run = tiny(place, "cepe", f"cepe.train_encoder={str(train_encoder).lower()}")
    model, data = cepe.build_model(run), cepe.build_data(run)
    trainable = cepe.RECIPE.trainable(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = adamw(trainable.values(), run.optim)
    for n in range(3):
        for batch in data.train.step(n, 0, 1):
            step(cepe, run, model, batch, optimizer)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(trainable)
    cross = {name for name in before if ".cross_attn." in name}
    encoder = {name for name in before if name.startswith("encoder.")}
    assert len(cross) == 2 * 5 and len(encoder) == 2 + 2 * 9
    assert changed == (cross | encoder if train_encoder else cross)


def test_from_zero_only_the_output_projection_moves_at_first(place):
    run = tiny(place, "cepe")
    model = cepe.build_model(run)
    (first, second, *_) = cepe.build_data(run).train.step(0, 0, 1)
    optimizer = adamw(cepe.RECIPE.trainable(model).values(), run.optim)
    base = load_model(place / "decoder", dtype="fp32")
    with torch.no_grad():
        hidden = base.model(first.tokens, position_ids=first.positions).last_hidden_state
        assert torch.equal(
            model.hidden_states(first.tokens, first.positions, first.contexts), hidden
        )
    for n, batch in enumerate((first, second)):
        grads = step(cepe, run, model, batch, optimizer)
        awake = {name for name, g in grads.items() if g is not None and g.abs().max() > 0}
        outputs = {name for name in grads if ".cross_attn.o_proj" in name}
        assert awake == (set(cepe.RECIPE.trainable(model)) if n else outputs)


def test_contexts_change_the_loss_and_never_what_is_scored(place):
    run = tiny(place, "cepe", "cepe.init=copy")
    model = cepe.build_model(run)
    (batch, *_) = cepe.build_data(run).train.step(0, 0, 1)
    other = replace(batch, contexts=batch.contexts.flip(2))
    (loss, count), (changed, same) = (cepe.RECIPE.loss(run, model, b) for b in (batch, other))
    assert loss.item() != changed.item()
    assert int(count) == int(same) == batch.scored == int((batch.labels != IGNORE).sum())
    # A row knows the token after its last one, unless its document ends there.
    assert batch.tokens.shape[0] * 15 <= batch.scored <= batch.tokens.numel()


def test_the_warm_up_learns_to_copy(tmp_path, lab_model):
    """Check: the loss falls far below what any model reaches that does not see the context.

    The text is uniform over 28 tokens, so that without the answer the loss is log 28 at best.
    """
    wide = {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 4, "head_dim": 8}
    decoder = make_decoder(tmp_path / "decoder", lab_model, **wide)
    with StoreWriter(tmp_path / "store", tokenizer_sha256(lab_model), 64, 1, 2, {}) as store:
        store.add(np.r_[1, np.random.default_rng(0).integers(4, 32, 200_000), 2])
    shape = ["data.seq_len=8", "contexts.size=4", "train.batch_rows=64", "train.eval_rows=64"]
    shape += ["train.micro_batch_rows=64", "optim.warmup_steps=20"]
    shape += [f"encoder.architecture.{k}=32" for k in ("hidden_size", "intermediate_size")]
    run = cepe_run("cepe_warmup", decoder, tmp_path / "store", tmp_path / "run", *shape)
    model, data = cepe.build_model(run), cepe.build_data(run)
    optimizer = adamw(cepe.RECIPE.trainable(model).values(), run.optim)
    for n in range(250):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(n, 250, run.optim)
        (batch,) = data.train.step(n, 0, 1)
        step(cepe, run, model, batch, optimizer)
    (batch,) = data.train.step(250, 0, 1)
    wrong = replace(batch, contexts=batch.contexts.roll(1, 0))
    losses = [cepe.loss(run, model, b) for b in (batch, wrong)]
    found = [total.item() / int(count) for total, count in losses]
    assert found[0] < math.log(28) - 0.5 and found[1] > math.log(28), found


def test_held_out_contexts_are_never_masked(place):
    data = cepe.build_data(tiny(place, "cepe", "contexts.mask=1"))
    (train, *_), (held_out, *_) = data.train.step(0, 0, 1), data.held_out.step(0, 0, 1)
    assert not train.context_mask.all() and train.contexts.shape == held_out.contexts.shape
    assert held_out.context_mask is None


def test_masked_language_rows(place):
    data = cepe_mlm.build_data(tiny(place, "cepe_mlm"))
    batches = [b for n in range(40) for b in data.train.step(n, 0, 1)]
    tokens = torch.cat([b.tokens for b in batches])
    labels = torch.cat([b.labels for b in batches])
    assert (tokens[labels != IGNORE] == 64).all() and (tokens[labels == IGNORE] < 64).all()
    assert labels[labels != IGNORE].min() > 2  # BOS 1 and EOS 2 are never to be guessed
    assert ((tokens == 1) | (tokens == 2)).any()
    held_out = data.held_out.step(0, 0, 1)
    other = cepe_mlm.build_data(tiny(place, "cepe_mlm", "seed=1"))
    assert torch.equal(held_out[0].tokens, other.held_out.step(0, 0, 1)[0].tokens)
    assert not torch.equal(batches[0].tokens, other.train.step(0, 0, 1)[0].tokens)


def exported(place, name, **changes):
    """An exported model whose added weights are shifted by 1, and its directory."""
    run = tiny(place, "cepe")
    model = cepe.build_model(run)
    with torch.no_grad():
        for parameter in model.added_parameters().values():
            parameter.add_(1)
        for name_of, value in changes.items():
            model.get_parameter(name_of.replace("__", ".")).add_(value)
    return model, export(model, None, place / name)


def test_the_main_stage_starts_from_an_export(place):
    trained, path = exported(place, "start")
    model = cepe.build_model(tiny(place, "cepe", f"cepe.start='{path}'"))
    for name, parameter in trained.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    again = CepeForCausalLM.from_pretrained(path)
    assert {n for n, _ in again.named_parameters()} == {n for n, _ in trained.named_parameters()}


@pytest.mark.parametrize(
    ("changes", "more", "line"),
    [
        (
            {"model__norm__weight": 0.5},
            [],
            r"cepe.start=.*/other was trained beside another decoder: model.norm.weight",
        ),
        (
            {},
            ["encoder.architecture.intermediate_size=28"],
            r"cepe.start=.*/other is of another model: it has encoder.layers.0.mlp.down",
        ),
        ({}, ["cepe.layers=1"], r"is of another model: it has model.layers.0.cross_attn"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(place, changes, more, line):
    _, path = exported(place, "other", **changes)
    with pytest.raises(UserError, match=line):
        cepe.build_model(tiny(place, "cepe", f"cepe.start='{path}'", *more))


def test_a_start_with_too_little_is_refused(place):
    path = export(cepe.build_model(tiny(place, "cepe", "cepe.layers=1")), None, place / "little")
    with pytest.raises(UserError, match=r"little lacks model.layers.0.cross_attn.* \(5 in all\)"):
        cepe.build_model(tiny(place, "cepe", f"cepe.start='{path}'"))


def test_a_start_that_is_not_there_says_what_makes_one(place):
    with pytest.raises(
        UserError, match=r"cepe.start=.*nowhere: no model and no checkpoint there; r"
    ):
        cepe.build_model(tiny(place, "cepe", f"cepe.start='{place / 'nowhere'}'"))


@pytest.mark.parametrize("function", ["build_model", "sketch"])
@pytest.mark.parametrize(
    ("recipe", "more", "line"),
    [
        ("cepe", ["encoder=none", "encoder.name=none"], "recipe cepe needs an encoder"),
        ("cepe", ["adapter=lora"], "recipe cepe leaves the decoder as it is: no adapter="),
        ("cepe_mlm", ["rope=pi"], "recipe cepe_mlm trains an encoder: no attention=, rope="),
        ("cepe", ["contexts.size=33"], "contexts.size=33, and the encoder reads 32 at a time"),
        ("cepe_mlm", ["data.seq_len=33"], "data.seq_len=33, and the encoder reads 32 at a time"),
        ("cepe", ["data.seq_len=33"], r"data.seq_len=33 is beyond the window of decoder, 32 tok"),
    ],
)
def test_what_a_recipe_does_not_have_is_refused(place, recipe, more, line, function):
    module = {"cepe": cepe, "cepe_mlm": cepe_mlm}[recipe]
    with pytest.raises(UserError, match=line):
        getattr(module, function)(tiny(place, recipe, *more))


@pytest.mark.parametrize("more", [["attention=streaming"], ["rope=pi", "rope.factor=2"]])
def test_a_row_may_pass_the_window_of_a_decoder_that_reads_on(place, more):
    cepe.sketch(tiny(place, "cepe", "data.seq_len=33", *more))


@pytest.mark.parametrize("recipe", ["cepe", "cepe_mlm"])
def test_a_plan_needs_no_more_than_the_encoders_path(place, recipe):
    module = {"cepe": cepe, "cepe_mlm": cepe_mlm}[recipe]
    path = place / f"encoder of {recipe}"
    export(cepe_mlm.build_model(tiny(place, "cepe_mlm")), None, path)
    run = tiny(place, recipe, f"encoder.path='{path}'")
    bare = replace(run, encoder=replace(run.encoder, architecture={}))
    found, whole = module.sketch(bare), module.build_model(run)
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (found, whole)]
    assert shapes[0] == shapes[1] and {p.device.type for p in found.parameters()} == {"meta"}


@pytest.mark.parametrize("function", ["build_model", "sketch"])
def test_an_encoder_of_no_shape_is_refused(place, function):
    run = tiny(place, "cepe_mlm")
    bare = replace(run, encoder=replace(run.encoder, architecture={}))
    with pytest.raises(
        UserError, match=r"no architecture: give encoder=llama2_7b encoder.architecture.vocab_size"
    ):
        getattr(cepe_mlm, function)(bare)


@pytest.mark.parametrize("recipe", ["cepe_warmup", "cepe_mlm"])
@pytest.mark.parametrize("name", ["nowhere/at/all", "nowhere/hf"])
def test_an_encoder_that_is_not_there_says_what_makes_one(place, recipe, name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    module = cepe_mlm if recipe == "cepe_mlm" else cepe
    with pytest.raises(
        UserError, match=rf"^encoder.path={name}: nothing there; recipe=cepe_mlm makes one"
    ):
        module.build_model(tiny(place, recipe, f"encoder.path={name}"))


@pytest.mark.parametrize(
    ("recipe", "more", "line"),
    [
        ("cepe", ["contexts.count=0"], "recipe cepe needs contexts.count above 0"),
        ("cepe_mlm", ["data.mask_rate=null"], "recipe cepe_mlm needs data.mask_rate"),
        (
            "cepe_mlm",
            ["encoder.architecture.vocab_size=64"],
            r"encoder.architecture.vocab_size=64 must be 65: data.store has tokens below 64",
        ),
    ],
)
def test_data_that_a_recipe_cannot_use_is_refused(place, recipe, more, line):
    module = {"cepe": cepe, "cepe_mlm": cepe_mlm}[recipe]
    with pytest.raises(UserError, match=line):
        module.build_data(tiny(place, recipe, *more))


def test_the_warm_up_must_repeat_the_whole_row(place):
    with pytest.raises(
        UserError, match=r"contexts.count x contexts.size = 24 equal to data.seq_len"
    ):
        tiny(place, "cepe_warmup", "contexts.count=3")


def test_tokens_are_counted_once(place):
    """Check: 4,000 x 128 x 256 of the warm-up, 20,000 x 128 x 8,192 of the main stage."""
    found = {}
    for recipe in ("cepe_warmup", "cepe"):
        full = ["model=llama2_7b", "data.store=[x]", f"recipe={recipe}"]
        run = cli.compose(full, RunConfig, "train", "run_schema")
        found[recipe] = run.train.max_steps * run.train.batch_rows * run.row_tokens
    assert found == {"cepe_warmup": 131_072_000, "cepe": 20_971_520_000}


def test_stores_of_the_two_kinds_may_differ(place, lab_model):
    with StoreWriter(place / "short", tokenizer_sha256(lab_model), 64, 1, 2, {}) as store:
        for _ in range(30):
            store.add([1, 5, 6, 7, 2])
    run = tiny(place, "cepe", f"contexts.stream_store=['{place / 'short'}']")
    documents, stream = cepe.build_data(run).train.sources
    assert documents.about.startswith("data.store: 40 documents, inside long documents")
    assert stream.about.startswith("contexts.stream_store: 30 documents, one stream")
