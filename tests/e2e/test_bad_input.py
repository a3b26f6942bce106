"""A user's mistake: one line that says what is wrong, exit code 2, nothing half-written."""

import json
import math
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from longctx.data.store import tokenizer_sha256
from longctx.train import trainer
from longctx.train.checkpoint import writer
from longctx.train.checkpoint.reader import open_checkpoint
from tests.helpers.entry import run_entry, tree
from tests.helpers.process import ROOT
from tests.helpers.tiny import make_store, tiny_arguments


def choices(group: str) -> str:
    return ", ".join(sorted(p.stem for p in (ROOT / "conf" / group).glob("*.yaml")))


OPTIM = "betas, clip, eps, final_fraction, lr, schedule, warmup_from, warmup_steps, weight_decay"
NO_INTEGER = "of type 'str' could not be converted to Integer"

# What is added to a good command line, and the line it gives; {run} is the run directory.
COMPOSED = {
    "unknown recipe": (["recipe=nope"], f"recipe=nope is not one of {choices('recipe')}"),
    "unknown parallel": (["parallel=zero9"], f"parallel=zero9 is not one of {choices('parallel')}"),
    "unknown attention": (
        ["attention=nope"],
        f"attention=nope is not one of {choices('attention')}",
    ),
    "unknown key": (["optim.lrr=1"], f"optim.lrr is not a setting: optim has {OPTIM}"),
    "ill-typed value": (
        ["train.max_steps=many"],
        f"train.max_steps=many: Value 'many' {NO_INTEGER}",
    ),
    "not KEY=VALUE": (
        ["foo bar"],
        "foo bar cannot be read as KEY=VALUE (quote special characters)",
    ),
    "packing": (["data.packing=foo"], "data.packing='foo' is not one of concat, best_fit"),
    "schedule": (
        ["optim.schedule=foo"],
        "optim.schedule='foo' is not one of constant, linear, cosine",
    ),
    "zero stage": (["parallel.zero_stage=5"], "parallel.zero_stage=5 is not one of 0, 1, 2, 3"),
    "tile": (["parallel.mlp_tile=-1"], "parallel.mlp_tile=-1 must be at least 0, tokens"),
    "weights offloaded without shards": (
        ["parallel.zero_stage=2", "parallel.offload_parameters=true"],
        "parallel.offload_parameters=true needs parallel.zero_stage=3",
    ),
    "an optimizer offloaded without shards": (
        ["parallel.zero_stage=0", "parallel.offload_optimizer=true"],
        "parallel.offload_optimizer=true needs parallel.zero_stage 1, 2 or 3",
    ),
    "layer inputs offloaded that are not kept": (
        ["parallel.activation_checkpointing=false", "parallel.offload_checkpoints=true"],
        "parallel.offload_checkpoints=true needs parallel.activation_checkpointing=true",
    ),
    "logger": (["logger=foo"], "logger='foo' is not one of wandb, none"),
    "seed": (["seed=-1"], "seed=-1 must be at least 0"),
    "no learning rate": (["optim.lr=0"], "optim.lr=0.0 must be above 0"),
    "missing model": (
        ["model=/no/such/path"],
        f"model=/no/such/path is neither a path nor one of {choices('model')}",
    ),
    "unknown model": (
        ["model=unknown_name"],
        f"model=unknown_name is neither a path nor one of {choices('model')}",
    ),
    "bf16 without master weights": (
        ["train.dtype=bf16", "parallel=zero0"],
        "train.dtype=bf16 needs parallel.zero_stage >= 1: DeepSpeed's stage 0 takes a wrong first "
        "Adam step in bf16",
    ),
    "builder": (["builder=recipes.nope"], "builder=recipes.nope: there is no such module"),
    "batch arithmetic": (
        ["train.batch_rows=3", "train.micro_batch_rows=2"],
        "train.batch_rows=3 is not a multiple of train.micro_batch_rows=2 x 1 ranks = 2",
    ),
    "evaluation arithmetic": (
        ["train.eval_rows=3", "train.micro_batch_rows=2"],
        "train.eval_rows=3 is not a multiple of train.micro_batch_rows=2 x 1 ranks",
    ),
    "a row that its ranks cannot share": (
        ["parallel.sp=3"],
        "data.seq_len=32 is not a multiple of parallel.sp=3: each rank holds an equal part of a "
        "row",
    ),
    "heads that its ranks cannot share": (
        ["parallel.sp=8", "dry_run=true"],
        "parallel.sp=8 does not divide the model's 4 attention heads: every rank needs as many",
    ),
    "processes that cannot share rows": (
        ["parallel.sp=2"],
        "parallel.sp=2 does not divide the 1 processes of this run: start a multiple of 2",
    ),
    "missing store": (
        ["data.store=[/no/store]"],
        "/no/store: no such token store (data_prep/build_store.py makes it; "
        "lab/corpus.sh those of data/lab)",
    ),
    "no store": (
        [f"data.store=['{ROOT}/conf']"],
        f"{ROOT}/conf is not a token store: no readable meta.json",
    ),
    "attention method": (
        ["attention.name=foo"],
        f"attention.name='foo' is not one of {choices('attention')}",
    ),
    "rope factor": (
        ["rope=pi", "rope.factor=0.5"],
        "rope.factor=0.5 must be at least 1: the window only grows",
    ),
    "adapter target": (
        ["adapter=lora", "adapter.targets=[nope]"],
        "adapter.targets: the model has no layer named 'nope'",
    ),
    "run_dir below a file": (
        [f"run_dir='{ROOT}/train.py/run'"],
        f"run_dir={ROOT}/train.py/run cannot be written: Not a directory",
    ),
    "run_dir is a file": (
        [f"run_dir='{ROOT}/train.py'"],
        f"run_dir={ROOT}/train.py cannot be written: File exists",
    ),
    "run_dir not writable": (
        ["run_dir=/proc/run"],
        "run_dir=/proc/run cannot be written: No such file or directory",
    ),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store")


@pytest.mark.parametrize("case", COMPOSED)
def test_before_training(case, store, tmp_path):
    more, line = COMPOSED[case]
    done = run_entry(tiny_arguments(store, tmp_path / "run", *more), tmp_path / "log")
    assert done.error == line
    assert done.err.count("\n") == 1 and done.out == ""
    assert not (tmp_path / "run").exists()


def test_no_recipe(tmp_path):
    done = run_entry([f"run_dir='{tmp_path}/run'"], tmp_path / "log")
    assert done.error == f"recipe= is missing: give one of {choices('recipe')}"
    assert not (tmp_path / "run").exists()


def test_setting_without_default(tmp_path):
    done = run_entry(["recipe=pi", "data=store", f"run_dir='{tmp_path}/run'"], tmp_path / "log")
    assert done.error == "data.store has no default: give data.store=VALUE"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("case", ["unknown recipe", "batch arithmetic"])
def test_the_real_command_line_says_the_same(case, store, tmp_path):
    more, line = COMPOSED[case]
    command = [sys.executable, "train.py", *tiny_arguments(store, tmp_path / "run", *more)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (2, f"error: {line}\n", "")
    assert not (tmp_path / "run").exists()


# --- the data ------------------------------------------------------------------------------------


def test_store_of_another_tokenizer(store, tmp_path, lab_model):
    more = f"model.tokenizer='{lab_model}'"
    done = run_entry(tiny_arguments(store, tmp_path / "run", more), tmp_path / "log")
    assert done.error == (
        f"{store} was made with tokenizer 000000000000, but {lab_model} has tokenizer "
        f"{tokenizer_sha256(lab_model)[:12]}: build the store with that tokenizer"
    )
    assert not (tmp_path / "run").exists()


def test_rows_longer_than_the_data(store, tmp_path):
    tokens = json.loads((store / "meta.json").read_text())["tokens"]
    done = run_entry(tiny_arguments(store, tmp_path / "run", "data.seq_len=9999"), tmp_path / "log")
    line = f"data.store holds {tokens} tokens, less than one row of data.seq_len=9999"
    assert done.error == line
    assert not (tmp_path / "run").exists()


def test_held_out_rows_longer_than_the_data(store, tmp_path):
    few = make_store(tmp_path / "few", documents=1, longest=4)
    more = f"data.held_out=['{few}']"
    done = run_entry(tiny_arguments(store, tmp_path / "run", more), tmp_path / "log")
    assert done.error == "data.held_out holds 3 tokens, less than one row of data.seq_len=32"


def test_truncated_store(store, tmp_path):
    cut = Path(shutil.copytree(store, tmp_path / "cut"))
    data = (cut / "tokens.ds").read_bytes()
    (cut / "tokens.ds").write_bytes(data[:-2])
    done = run_entry(tiny_arguments(cut, tmp_path / "run"), tmp_path / "log")
    assert done.error == (
        f"{cut}/tokens.ds has {len(data) - 2} bytes, meta.json says {len(data)}: build it again"
    )
    assert not (tmp_path / "run").exists()


def test_corrupt_document(store, tmp_path):
    bad = Path(shutil.copytree(store, tmp_path / "bad"))
    data = bytearray((bad / "tokens.ds").read_bytes())
    data[2] ^= 1  # the second token of the first document
    (bad / "tokens.ds").write_bytes(data)
    done = run_entry(tiny_arguments(bad, tmp_path / "run"), tmp_path / "log")
    assert done.error == (f"{bad}/tokens.ds: document 0 is corrupt (CRC32 differs): build it again")
    assert not (tmp_path / "run" / "checkpoints").exists()


# --- the run -------------------------------------------------------------------------------------


def rate_that_destroys_at_step_3() -> None:
    usual = trainer.learning_rate
    trainer.learning_rate = lambda step, *more: math.nan if step == 2 else usual(step, *more)


@pytest.mark.parametrize("how", ["false", "true"])
def test_weights_that_are_not_finite(how, store, tmp_path):
    """Nothing of them is saved, and the run ends after the third step that they spoil."""
    more = ("train.save_every=1", "train.keep_last=1", "train.max_skipped=3")
    arguments = tiny_arguments(store, tmp_path / "run", *more, f"train.save_async={how}")
    done = run_entry(arguments, tmp_path / "log", rate_that_destroys_at_step_3)
    assert done.error == (
        "step 6: the loss is nan, the gradient norm inf; that is bad step number 3 in a row "
        "(train.max_skipped=3). None of them was taken, and what is saved is finite. "
        "Lower optim.lr?"
    )
    assert "warning: step 4 skipped: the loss is nan, the gradient norm inf (1 skipped" in done.err
    for step in (3, 4, 5):
        assert f"step_{step:08d} could not be written: " in done.err
    found = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [m["skipped"] for m in found] == [0, 0, 0, 1, 2]
    assert [m["loss"] is None for m in found] == [False] * 3 + [True] * 2
    saved = tmp_path / "run" / "checkpoints"
    assert [p.name for p in saved.iterdir()] == ["step_00000002"]
    open_checkpoint(saved / "step_00000002")


def full_disk(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def no_room_for_shards() -> None:
    write, calls = writer.save_file, []

    def second_fails(tensors: dict, path: Path) -> None:
        calls.append(path)
        write(tensors, path)
        if len(calls) == 2:
            full_disk()

    writer.save_file = second_fails


def no_room_for_the_index() -> None:
    writer.json.dump = full_disk


def room_for_small_files() -> None:
    """The kernel lets no file of this process grow beyond 4,096 bytes: as a full disk, EFBIG."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


FULL = "[Errno 28] No space left on device"


@pytest.mark.parametrize("how", ["false", "true"])
@pytest.mark.parametrize(
    ("prepare", "failed", "left", "why"),
    [
        (no_room_for_shards, [2], ["step_00000001", "step_00000003"], FULL),
        (no_room_for_the_index, [1, 2, 3], [], FULL),
        (room_for_small_files, [1, 2, 3], [], "File too large"),
    ],
)
def test_a_disk_that_is_full_for_a_while(prepare, failed, left, why, how, store, tmp_path):
    """The run goes on, with the checkpoints that it has; only the last one must be written."""
    more = ("train.save_every=1", "train.max_steps=3", f"train.save_async={how}")
    done = run_entry(tiny_arguments(store, tmp_path / "run", *more), tmp_path / "log", prepare)
    saved = tmp_path / "run" / "checkpoints"
    for step in (1, 2, 3):
        line = f"{saved}/step_{step:08d} could not be written: "
        assert (line in done.err) == (step in failed), done.err
        if step in failed[:2] and step < 3:
            assert f"warning: {line}" in done.err and why in done.err
    if 3 in failed:
        assert done.error.startswith(f"{saved}/step_00000003 could not be written: ")
    else:
        assert done.code == 0
    assert sorted(p.name for p in saved.glob("*")) == left
    for name in left:
        open_checkpoint(saved / name)
    assert (tmp_path / "run" / "hf").exists() == (3 not in failed)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


# --- resuming ------------------------------------------------------------------------------------


class Trained(NamedTuple):
    store: Path
    run_dir: Path

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def arguments(self, *more: str, tied: bool = True) -> list[str]:
        steps = ("train.max_steps=2", "train.save_every=1", "train.keep_last=0")
        return tiny_arguments(self.store, self.run_dir, *steps, *more, tied=tied)


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory):
    place = tmp_path_factory.mktemp("trained")
    trained = Trained(store, place / "run")
    done = run_entry(trained.arguments(), place / "log")
    assert done.code == 0, done
    return trained


@pytest.fixture
def trained(finished, tmp_path):
    """A finished run of two steps and two checkpoints, to be spoilt."""
    return Trained(finished.store, Path(shutil.copytree(finished.run_dir, tmp_path / "run")))


@pytest.mark.parametrize(
    ("more", "tied", "line"),
    [
        (
            ["resume=none"],
            True,
            "{0} already holds checkpoints: take another run_dir, or resume=auto to go on",
        ),
        (
            ["resume=/no/checkpoint"],
            True,
            "/no/checkpoint is not a checkpoint: it has no readable checkpoint.json",
        ),
        (
            ["resume={0}/step_00000001"],
            True,
            "{0} holds later checkpoints (step_00000002...) than {0}/step_00000001: take another "
            "run_dir, or resume=auto to resume from the newest",
        ),
        ([], False, "{0}/step_00000002 is of another model: trained parameters differ"),
        (
            ["rope=pi", "rope.factor=2"],
            True,
            "{0}/step_00000002 was trained beside other frozen weights or rotary frequencies than "
            "those of lab_scratch",
        ),
        (
            ["data.packing=concat"],
            True,
            "{0}/step_00000002 was trained on other data: data.packing: best_fit -> concat",
        ),
        (
            ["optim.lr=0.5", "optim.clip=2"],
            True,
            "{0}/step_00000002 comes from a run with other settings (optim.lr: 0.01 -> 0.5; "
            "optim.clip: 1.0 -> 2.0): take another run_dir or the old settings",
        ),
        (
            ["train.max_steps=1"],
            True,
            "{0}/step_00000002 is at step 2, beyond train.max_steps=1",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit(trained, more, tied, line, tmp_path):
    before = tree(trained.run_dir)
    more = [argument.format(trained.checkpoints) for argument in more]
    done = run_entry(trained.arguments(*more, tied=tied), tmp_path / "log")
    assert done.error == line.format(trained.checkpoints)
    assert tree(trained.run_dir) == before


def shard(step: Path) -> Path:
    return step / "state_00000_of_00001.safetensors"


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def test_damaged_checkpoint_is_passed_over(trained, tmp_path):
    newest = trained.checkpoints / "step_00000002"
    whole = shard(newest).read_bytes()
    damage(shard(newest))
    shutil.copytree(newest, trained.checkpoints / "step_00000003.tmp")  # as a killed run leaves it
    done = run_entry(trained.arguments(), tmp_path / "log")
    assert done.code == 0, done
    warning = f"warning: {shard(newest)} is damaged or missing; trying an older checkpoint\n"
    assert warning in done.err
    assert f"resuming from {trained.checkpoints}/step_00000001\n" in done.err
    assert shard(newest).read_bytes() == whole  # made again, bit for bit
    open_checkpoint(newest)
    assert sorted(p.name for p in trained.checkpoints.iterdir()) == [
        "step_00000001",
        "step_00000002",
    ]


def test_only_damaged_checkpoints(trained, tmp_path):
    for step in trained.checkpoints.iterdir():
        damage(shard(step))
    before = tree(trained.run_dir)
    done = run_entry(trained.arguments(), tmp_path / "log")
    newest = trained.checkpoints / "step_00000002"
    assert done.error == (
        f"{shard(newest)} is damaged or missing, and there is no older valid checkpoint: "
        "take another run_dir"
    )
    assert tree(trained.run_dir) == before
