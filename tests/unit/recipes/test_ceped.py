"""CEPED: the teacher is the base model bit for bit, student and teacher meet, stored = on line."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from longctx import cli
from longctx.batch import IGNORE
from longctx.commands.teacher import write
from longctx.config import RunConfig, TeacherConfig
from longctx.config.distill import MODES
from longctx.data.store import tokenizer_sha256
from longctx.data.stored_teacher import StoredTeacher
from longctx.errors import UserError
from longctx.models.load import load_model
from longctx.parallel import mesh
from longctx.recipes import cepe, ceped
from longctx.train.distill import teacher_states
from longctx.train.optim import adamw
from tests.helpers.cepe import cepe_run, make_decoder
from tests.helpers.tiny import make_store


@pytest.fixture(scope="module")
def place(tmp_path_factory, lab_model):
    path = tmp_path_factory.mktemp("ceped")
    make_decoder(path / "decoder", lab_model)
    make_store(path / "store", few=True, tokenizer=tokenizer_sha256(lab_model))
    return path


def tiny(place, *more):
    return cepe_run("ceped", place / "decoder", place / "store", place / "run", "kl.top_k=5", *more)


def first(run):
    (batch, *_) = ceped.build_data(run).train.step(0, 0, 1)
    return batch


@pytest.mark.parametrize("init", ["zero", "copy"])
def test_the_teacher_is_the_base_model_bit_for_bit(place, init):
    run = tiny(place, f"cepe.init={init}")
    model, batch = ceped.build_model(run), first(tiny(place))
    base = load_model(place / "decoder", dtype="fp32")
    text = torch.cat([batch.contexts.flatten(1), batch.tokens], dim=1)
    with torch.no_grad():
        want = base(input_ids=text).logits[:, batch.contexts[0].numel() :]
    states = teacher_states(model, batch)
    assert torch.equal(model.get_output_embeddings()(states), want)
    assert not states.requires_grad and model.get_decoder().training


@pytest.mark.parametrize("mode", MODES)
def test_loss_is_cross_entropy_and_divergence_of_both_models(place, mode):
    run = tiny(place, "cepe.init=copy", f"kl.mode={mode}", "kl.temperature=1.5", "kl.weight=0.7")
    model, batch = ceped.build_model(run), first(tiny(place))
    base = load_model(place / "decoder", dtype="fp32")
    with torch.no_grad():
        student = model(batch.tokens, context_ids=batch.contexts).logits
        text = torch.cat([batch.contexts.flatten(1), batch.tokens], dim=1)
        teacher = base(input_ids=text).logits[:, batch.contexts[0].numel() :]
        here = batch.labels != IGNORE
        ce = torch.nn.functional.cross_entropy(student[here], batch.labels[here], reduction="sum")
        p, q = (torch.softmax(x[here] / 1.5, -1) for x in (teacher, student))
        if mode != "full":
            p, ids = p.topk(5, dim=-1)
            q = q.gather(-1, ids)
        if mode == "topk_rest":
            p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
        want = ce + 0.7 * 1.5**2 * (p * (p / q).log()).sum()
    got, count = ceped.RECIPE.loss(run, model, batch)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    assert int(count) == batch.scored


def test_without_weight_it_is_cepe(place):
    run = tiny(place, "cepe.init=copy", "kl.weight=0")
    model, batch = ceped.build_model(run), first(run)
    losses = [recipe.RECIPE.loss(run, model, batch)[0] for recipe in (ceped, cepe)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


def test_only_the_student_learns(place):
    run = tiny(place, "optim.lr=1e-2")
    model, data = ceped.build_model(run), ceped.build_data(run)
    trainable = ceped.RECIPE.trainable(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = adamw(trainable.values(), run.optim)
    batches = data.train.step(0, 0, 1)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        sums = [ceped.RECIPE.loss(run, model, batch) for batch in batches]
        loss = sum(s for s, _ in sums) / sum(n for _, n in sums)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(trainable) and losses[-1] < losses[0]


def stored_run(place, folder, *more):
    return tiny(
        place, "kl.mode=topk_rest", "teacher.source=stored", f"teacher.store='{folder}'", *more
    )


def test_a_stored_teacher_trains_as_the_one_on_line(place, tmp_path):
    stored = stored_run(place, tmp_path / "teacher", "cepe.init=copy")
    write(stored, mesh.start())
    online = replace(stored, teacher=TeacherConfig())
    model = ceped.build_model(stored)
    for step in range(stored.train.max_steps):
        pairs = [ceped.build_data(run).train.step(step, 0, 1) for run in (stored, online)]
        for ours, theirs in zip(*pairs, strict=True):
            assert torch.equal(ours.tokens, theirs.tokens)
            assert ours.teacher_ids.shape == (2, 16, 5) and theirs.teacher_ids is None
            results = []
            for batch in (ours, theirs):
                model.zero_grad()
                loss, _ = ceped.RECIPE.loss(stored, model, batch)
                loss.backward()
                weights = ceped.RECIPE.trainable(model).values()
                results.append((loss.detach(), torch.cat([p.grad.flatten() for p in weights])))
            (loss, slope), (wanted, right) = results
            torch.testing.assert_close(loss, wanted, rtol=2**-10, atol=0)  # fp16 has 11 bits
            assert (slope - right).norm() < 2**-10 * right.norm()


def test_held_out_rows_ask_the_teacher_on_line(place, tmp_path):
    run = stored_run(place, tmp_path / "teacher")
    write(run, mesh.start())
    (batch, *_) = ceped.build_data(run).held_out.step(0, 0, 1)
    assert batch.teacher_ids is None
    loss, _ = ceped.RECIPE.loss(run, ceped.build_model(run), batch)
    assert loss.isfinite()


def test_writing_goes_on_where_it_ended(place, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("longctx.data.stored_teacher.PART_BYTES", 5000)
    run = stored_run(place, tmp_path / "teacher")
    write(run, mesh.start())
    assert "GB in 3 parts; 32 rows are missing" in capfd.readouterr().err
    parts = sorted((tmp_path / "teacher").glob("part_*"))
    assert len(parts) == 3
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in parts}
    parts[1].unlink()
    with pytest.raises(UserError, match="lacks 1 of 3 parts"):
        ceped.build_data(run)
    write(run, mesh.start())
    after = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in parts}
    assert after[parts[0]] == before[parts[0]] and after[parts[1]][1] == before[parts[1]][1]
    StoredTeacher(tmp_path / "teacher").read(31)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed=1", "is of other rows: written with .*seed=0, not 1"),
        ("contexts.count=1", "is of other rows: written with contexts.count=2, not 1"),
        ("kl.top_k=6", "was written with top_k=5, not 6"),
        ("kl.temperature=2", "was written with temperature=1.0, not 2.0"),
        ("data.seq_len=8", "was written with seq_len=16, not 8"),
        ("train.max_steps=5", "holds 32 rows, and the run reads 40"),
    ],
)
def test_another_run_is_refused(place, tmp_path_factory, change, message):
    folder = tmp_path_factory.getbasetemp() / "shared_teacher"
    if not folder.exists():
        write(stored_run(place, folder), mesh.start())
    with pytest.raises(UserError, match=message):
        ceped.build_data(stored_run(place, folder, change))


def test_another_decoder_is_refused(place, lab_model, tmp_path):
    run = stored_run(place, tmp_path / "teacher")
    write(run, mesh.start())
    other = make_decoder(tmp_path / "other", lab_model, seed=1)
    with pytest.raises(UserError, match="computed with other weights"):
        ceped.build_model(replace(run, model=replace(run.model, path=str(other))))


def test_a_directory_of_another_run_is_not_written_to(place, tmp_path):
    write(stored_run(place, tmp_path / "teacher"), mesh.start())
    with pytest.raises(UserError, match=r"was begun for .*seed=0, not 1"):
        write(stored_run(place, tmp_path / "teacher", "seed=1"), mesh.start())


def test_no_room_on_the_disk(place, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=9))
    with pytest.raises(UserError, match=r"are to be written and 0\.00 GB are free"):
        write(stored_run(place, tmp_path / "teacher"), mesh.start())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("contexts.count=3", "the teacher reads contexts and row in one, 40 tokens.* has 32"),
        ("contexts.mask=0.3", "contexts.mask=0"),
        ("contexts.repeat=true", "contexts.repeat=false"),
    ],
)
def test_what_a_teacher_cannot_do_is_refused(place, change, message):
    run = tiny(place, change)
    with pytest.raises(UserError, match=message):
        ceped.build_data(run)
        ceped.build_model(run)


def test_the_papers_numbers():
    run = cli.compose(
        ["recipe=ceped", "model=llama2_7b_chat", "data=store",
         "data.store=[x]"], RunConfig, "train", "run_schema",
    )  # fmt: skip
    assert run.train.max_steps * run.train.batch_rows * run.row_tokens == 10_485_760_000
    assert (run.kl.mode, run.kl.weight, run.kl.lm_weight) == ("full", 2.0, 1.0)
    assert (run.optim.lr, run.optim.schedule, run.optim.warmup_steps) == (3e-4, "cosine", 800)
    assert (run.contexts.count, run.contexts.size, run.data.seq_len) == (8, 256, 2048)
