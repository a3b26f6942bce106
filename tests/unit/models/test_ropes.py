"""Every rope scaling in a model: what is built rotates as asked, and so does what is saved."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import longctx
from longctx.models.export.directory import export
from tests.helpers.networks import network, tokens
from tests.helpers.ropes import NAMES, example


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_scaled_model_is_a_plain_checkpoint_that_comes_back(name, tmp_path):
    """Transformers alone computes the same with its own attention, also beyond the window."""
    ours, text = network(rope={"name": name, **example(name)["numbers"]}), tokens(2, 40)
    logits = ours(text).logits
    assert torch.allclose(logits, network()(text).logits, atol=1e-4) == (name == "none")
    path = export(ours, None, tmp_path / "hf")
    assert not list(path.glob("*.py"))
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    torch.testing.assert_close(theirs(text).logits, logits, rtol=0, atol=1e-5)
    again = longctx.load_model(path, dtype=torch.float64)
    torch.testing.assert_close(again(text).logits, logits, rtol=0, atol=1e-12)
