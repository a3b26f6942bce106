"""What ranks share as they start: one copy of the weights, the checking of a checkpoint."""

import ctypes
import gc
import shutil
import socket
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longctx.errors import UserError
from longctx.models import files, load
from longctx.parallel import mesh
from longctx.parallel.zero import MOMENTS
from longctx.train.checkpoint import writer, reader
from longctx.train import node_copy as at
from longctx.recipes.causal_lm import RECIPE
from tests.helpers.spawn import spawn
from tests.helpers.tiny import make_store, tiny_run

WIDE = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 2048,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
MIB = 2**20


def private() -> float:
    """MiB of this process that are no file, without what its allocator keeps for later."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(x.split()[1]) for x in lines if x.startswith("Anonymous")) / 1024


def load_as(folder: Path, dtype: str, name: str = "model") -> tuple[torch.nn.Module, str]:
    """On each rank: the model as a run of that dtype gets it, and where from."""
    ranks = mesh.start()
    run = tiny_run(folder / "store", folder / "run", f"train.dtype={dtype}")
    run = replace(run, model=replace(run.model, path=str(folder / name), tokenizer=None))
    with at.node_copy(run, ranks) as local:
        assert local.model.tokenizer in (run.model.path, None)
        place = str(local.model.path)
        return RECIPE.build_model(local), place


def ranks_load(folder: Path) -> None:
    """On each rank."""
    tempfile.tempdir = str(folder / "scratch")
    expected = {k: v.clone() for k, v in load.load_model(folder / "model").state_dict().items()}
    for dtype in ("fp32", "bf16"):
        if dtype == "bf16" and mesh.start().main:  # what a killed process left behind
            left = folder / "scratch" / f"{at.PREFIX}{socket.gethostname()}-999999999-x"
            left.mkdir(exist_ok=True)
        before = private()
        model, place = load_as(folder, dtype)
        grown = private() - before
        size = sum(p.numel() * p.element_size() for p in model.parameters()) / MIB
        assert (place == str(folder / "model")) == (dtype == "fp32"), place
        assert grown < 0.25 * size, (dtype, grown, size)
        kind = files.DTYPES[dtype]
        for name, value in model.state_dict().items():
            assert value.dtype == kind and torch.equal(value, expected[name].to(kind)), name
        with at.node_copy(tiny_run(folder / "store", folder / "run"), mesh.start(), False) as own:
            assert own.model.path is None
        del model
        mesh.start().barrier()
        assert not any((folder / "scratch").iterdir())  # nothing is left behind
        mesh.start().barrier()
    at.ROOM, before = 1e9, private()
    model, place = load_as(folder, "bf16")  # no room: each its own
    assert place == str(folder / "model")
    assert private() - before > 0.75 * size
    assert torch.equal(model.lm_head.weight, expected["lm_head.weight"].bfloat16())
    copy, at.cast_copy = at.cast_copy, None
    at.ROOM = 1.05
    assert load_as(folder, "bf16")[1] == str(folder / "model")  # a fault of ours ends no run
    at.cast_copy = copy
    broken = next((folder / "broken").glob("*.safetensors"))
    with pytest.raises(UserError, match="cannot load the weights"):  # on both ranks
        load_as(folder, "bf16", "broken")
    assert broken.is_file() and not any((folder / "scratch").iterdir())
    socket.gethostname = lambda: f"machine-{mesh.start().rank}"
    assert load_as(folder, "bf16")[1] == str(folder / "model")  # alone on its machine


def ranks_check(folder: Path) -> None:
    """On each rank: it reads its part of a checkpoint, and all come to one verdict."""
    ranks, read, usual = mesh.start(), [], reader.file_check
    root = folder / "checkpoints"
    for step in (1, 2):
        values = {kind: torch.full((3,), float(step)) for kind in ("weight", *MOMENTS)}
        parts = iter([(name, values) for name in ("a", "b")])
        writer.save(root, step, parts, {"tokens": 0}, ranks)
    reader.file_check = lambda path: (read.append(path.name), usual(path))[1]
    found, problems = reader.newest(root, ranks)
    assert found is not None and found.step == 2 and not problems
    assert read == [f"state_{ranks.rank:05d}_of_00002.safetensors"]
    assert {name: list(get()) for name, (_, get) in found.weights().items()} == {
        "a": [2.0] * 3, "b": [2.0] * 3
    }  # fmt: skip
    ranks.barrier()
    second = root / "step_00000002" / "state_00001_of_00002.safetensors"
    if ranks.main:
        second.write_bytes(second.read_bytes()[:-1] + b"?")
    ranks.barrier()
    found, problems = reader.newest(root, ranks)  # rank 0 has not read that file
    assert found is not None and found.step == 1
    assert problems == [f"{second} is damaged or missing"]
    ranks.barrier()
    if ranks.main:
        (root / "step_00000001" / reader.INDEX).write_text("{}")
    ranks.barrier()
    assert reader.newest(root, ranks)[0] is None


def on_ranks(folder: Path) -> None:
    ranks_load(folder)
    ranks_check(folder)


@pytest.mark.dist
def test_what_ranks_share_as_they_start(tmp_path):
    make_store(tmp_path / "store")
    (tmp_path / "scratch").mkdir()
    load.build_model(WIDE).save_pretrained(tmp_path / "model", max_shard_size="20MB")
    shutil.copytree(tmp_path / "model", tmp_path / "broken")
    cut = next((tmp_path / "broken").glob("*.safetensors"))
    cut.write_bytes(cut.read_bytes()[:5000])
    spawn(on_ranks, 2, tmp_path)
