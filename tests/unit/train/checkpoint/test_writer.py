import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from longctx.errors import UserError
from longctx.parallel.mesh import Mesh
from longctx.train.checkpoint import reader, writer


@dataclasses.dataclass(frozen=True)
class Alone(Mesh):
    """A mesh of one that needs no process group."""

    def sum(self, value: float) -> float:
        return float(value)

    def same(self, value):
        return value

    def barrier(self) -> None:
        return


MESH = Alone(0, 1, torch.device("cpu"))
ABOUT = {"tokens": 7, "run": {}, "fingerprint": {}}


def state(seed: int = 0, dtype: torch.dtype = torch.float32):
    draw = torch.Generator().manual_seed(seed)
    for name, shape in (("a/b.weight", (3, 2)), ("c.bias", (4,))):
        yield (
            name,
            {
                kind: torch.randn(shape, generator=draw).to(dtype)
                for kind in ("weight", "exp_avg", "exp_avg_sq")
            },
        )


def save(root, step, **more):
    return writer.save(root, step, state(step, **more), ABOUT, MESH)


def names(root):
    return sorted(p.name for p in root.iterdir())


def damage(path):
    file = next(path.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_comes_back_exactly_and_in_fp32(tmp_path, dtype):
    path = save(tmp_path, 12, dtype=dtype)
    assert names(tmp_path) == ["step_00000012"] and path == tmp_path / "step_00000012"
    found = reader.open_checkpoint(path)
    assert found.step == 12 and found.meta["tokens"] == 7
    got = dict(found.state())
    for name, values in state(12, dtype):
        for kind, value in values.items():
            assert got[name][kind].dtype == torch.float32
            assert torch.equal(got[name][kind], value.float())
    weights = {n: (shape, read()) for n, (shape, read) in found.weights().items()}
    assert weights.keys() == got.keys()
    for name, (shape, weight) in weights.items():
        assert shape == weight.shape and torch.equal(weight, got[name]["weight"])


def test_a_leftover_of_a_killed_run_is_no_checkpoint(tmp_path):
    save(tmp_path, 5)
    shutil.copytree(tmp_path / "step_00000005", tmp_path / "step_00000009.tmp")
    (tmp_path / "step_00000009.tmp" / "state_00001_of_00002.safetensors").touch()
    found, problems = reader.newest(tmp_path)
    assert found is not None and found.step == 5 and problems == []
    save(tmp_path, 9)  # takes its place, with nothing of it left
    assert names(tmp_path / "step_00000009") == [
        "checkpoint.json",
        "state_00000_of_00001.safetensors",
    ]


def test_newest_passes_over_what_is_damaged(tmp_path):
    for step in (5, 10, 15, 20, 25, 30):
        save(tmp_path, step)
    (tmp_path / "step_00000030" / "checkpoint.json").write_text("")
    short = next((tmp_path / "step_00000025").glob("*.safetensors"))
    short.write_bytes(short.read_bytes()[:-1])
    bad = damage(tmp_path / "step_00000020")
    next((tmp_path / "step_00000015").glob("*.safetensors")).unlink()
    found, problems = reader.newest(tmp_path)
    assert found is not None and found.step == 10
    assert "step_00000030 is not a checkpoint" in problems[0]
    assert [p.rpartition("/")[2] for p in problems[1:]] == [f"{bad.name} is damaged or missing"] * 3


def test_newest_of_nothing(tmp_path):
    assert reader.newest(tmp_path / "none") == (None, [])


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "3"])
def test_unreadable_index(tmp_path, content):
    path = save(tmp_path, 1)
    (path / "checkpoint.json").write_text(content)
    with pytest.raises(
        UserError, match=r"is not a checkpoint: it has no readable checkpoint\.json"
    ):
        reader.open_checkpoint(path)


def test_prune_keeps_the_newest(tmp_path):
    for step in (5, 10, 15, 20):
        save(tmp_path, step)
    writer.prune(tmp_path, 20, 0)
    assert len(names(tmp_path)) == 4
    writer.prune(tmp_path, 20, 2)
    assert names(tmp_path) == ["step_00000015", "step_00000020"]


def test_prune_never_takes_the_one_just_saved(tmp_path):
    """A damaged step 10 was passed over; the run went on from 5 and now saved 6."""
    for step in (5, 10, 6):
        save(tmp_path, step)
    damage(tmp_path / "step_00000010")
    writer.prune(tmp_path, 6, 1)
    assert names(tmp_path) == ["step_00000006", "step_00000010"]


@pytest.mark.parametrize("fails", ["save_file", "_write_json"])
def test_full_disk_leaves_the_older_one_and_nothing_else(tmp_path, monkeypatch, fails):
    save(tmp_path, 5)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, fails, full)
    with pytest.raises(UserError, match=r"step_00000006 could not be written: .*No space left"):
        save(tmp_path, 6)
    assert names(tmp_path) == ["step_00000005"]
    reader.open_checkpoint(tmp_path / "step_00000005")


def test_names_are_on_the_disk_before_and_after_the_renaming(tmp_path, monkeypatch):
    """A machine that crashes keeps the checkpoint: files, then their names, then its own name."""
    synced, fsync = [], os.fsync

    def note(number):
        synced.append(Path(f"/proc/self/fd/{number}").readlink().name)
        fsync(number)

    monkeypatch.setattr(os, "fsync", note)
    path = save(tmp_path, 7)
    shard = "state_00000_of_00001"
    assert synced == [
        f"{shard}.safetensors",
        f"{shard}.check",
        "checkpoint.json",
        "step_00000007.tmp",
        tmp_path.name,
    ]
    assert names(path) == ["checkpoint.json", f"{shard}.safetensors"]


def model() -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2, bias=False))
    net.register_buffer("inv_freq", torch.ones(2))
    net[1].weight.requires_grad_(False)
    return net


def test_fingerprint():
    torch.manual_seed(0)
    net = model()
    first = writer.fingerprint(net)
    with torch.no_grad():
        net[0].weight.mul_(2)
    assert writer.fingerprint(net) == first  # what is trained may change
    with torch.no_grad():
        net[1].weight[0, 0] += 1
    second = writer.fingerprint(net)
    assert second["trained"] == first["trained"] and second["fixed"] != first["fixed"]
    net.inv_freq /= 2
    third = writer.fingerprint(net)
    assert third["trained"] == first["trained"] and third["fixed"] != second["fixed"]
    net[0].bias.requires_grad_(False)
    assert writer.fingerprint(net)["trained"] != first["trained"]


def test_weights_go_into_a_model_that_has_them(tmp_path):
    net = nn.Linear(2, 3).to(torch.bfloat16)
    values = {
        n: {kind: torch.rand(p.shape) for kind in ("weight", "exp_avg", "exp_avg_sq")}
        for n, p in net.named_parameters()
    }
    path = writer.save(tmp_path, 1, iter(values.items()), ABOUT, MESH)
    found = reader.open_checkpoint(path)
    reader.load_weights(net, found)
    assert torch.equal(net.weight, values["weight"]["weight"].to(torch.bfloat16))
    for other in (nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 3))):
        with pytest.raises(UserError, match=r"is of another model: it has (weight|bias) \["):
            reader.load_weights(other, found)


def test_index_is_json_that_anyone_can_read(tmp_path):
    index = json.loads((save(tmp_path, 3) / "checkpoint.json").read_text())
    assert index["step"] == 3 and list(index["files"]) == ["state_00000_of_00001.safetensors"]


def test_the_newest_may_be_named_and_an_older_one_not(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    reader.refuse_later(tmp_path, reader.open_checkpoint(tmp_path / "step_00000002"), MESH)
    with pytest.raises(UserError, match=r"later checkpoints \(step_00000002\.\.\.\)"):
        reader.refuse_later(tmp_path, reader.open_checkpoint(tmp_path / "step_00000001"), MESH)
