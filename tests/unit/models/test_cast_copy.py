import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from longctx.errors import UserError
from longctx.models.cast_copy import INDEX, cast_copy, needs_cast, stored_in

LARGE = torch.arange(2**19, dtype=torch.float32)
STORED = {
    "first": {"a": LARGE.half(), "norm": torch.tensor([1.0, 1.0009765625])},
    "second": {"b": LARGE.half() / 3, "ids": torch.arange(5)},
}


@pytest.fixture
def sharded(tmp_path):
    """A checkpoint of two files, and one that transformers does not read."""
    folder = tmp_path / "stored"
    folder.mkdir()
    for name, tensors in STORED.items():
        save_file(tensors, folder / f"{name}.safetensors")
    save_file({"a": LARGE}, folder / "consolidated.safetensors")
    named = {key: f"{name}.safetensors" for name, tensors in STORED.items() for key in tensors}
    (folder / INDEX).write_text(json.dumps({"weight_map": named}))
    (folder / "config.json").write_text("{}")
    return folder


def test_large_weights_are_cast_and_small_ones_stay(sharded, tmp_path):
    assert stored_in(str(sharded)) == sharded
    size = 2 * 2 * 2**19
    assert size <= needs_cast(sharded, torch.bfloat16) <= size + 100
    (tmp_path / "copy").mkdir()
    cast_copy(sharded, tmp_path / "copy", torch.bfloat16)
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == sorted(
        ["config.json", INDEX, "first.safetensors", "second.safetensors"]
    )
    for name, tensors in STORED.items():
        found = load_file(tmp_path / "copy" / f"{name}.safetensors")
        assert found.keys() == tensors.keys()
        for key, value in tensors.items():
            large = value.numel() > 1000
            assert found[key].dtype == (torch.bfloat16 if large else value.dtype)
            assert torch.equal(found[key], value.bfloat16() if large else value)
    assert needs_cast(tmp_path / "copy", torch.bfloat16) == 0
    assert needs_cast(tmp_path / "copy", torch.float32) > 2 * size - 1


def test_what_is_not_all_there_is_not_copied(sharded, tmp_path):
    (sharded / "second.safetensors").unlink()
    assert stored_in(str(sharded)) is None
    (sharded / INDEX).unlink()
    assert stored_in(str(sharded)) is None
    (tmp_path / "x.gguf").touch()
    assert stored_in(str(tmp_path / "x.gguf")) is None
    with pytest.raises(UserError):
        stored_in(str(tmp_path / "nothing"))
