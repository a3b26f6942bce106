"""What the wrapped attention refuses, and that it asks once for positions; see tests/dist too."""

import pytest
import torch
from torch import nn

from longctx.attention.full import Full
from longctx.errors import UserError
from longctx.models.wrap_attention import require_angles_by_position, wrap_attention
from longctx.parallel import mesh, ulysses
from longctx.parallel.exchange import _common
from tests.helpers.networks import network, tokens


@pytest.fixture
def group():
    mesh.start()
    return torch.distributed.group.WORLD


def qkv(heads=4, key_heads=2, length=6):
    random = torch.Generator().manual_seed(0)
    return [torch.randn(2, h, length, 8, generator=random) for h in (heads, key_heads, key_heads)]


def test_one_rank_is_the_attention_itself(group):
    attend, positions = Full().attend, torch.tensor([[0, 1, 2, 0, 1, 2]])
    spread = ulysses.ulysses(attend, group)
    expected, _ = attend(nn.Module(), *qkv(), None, position_ids=positions)
    found, weights = spread(nn.Module(), *qkv(), None, position_ids=positions)
    assert torch.equal(found, expected) and weights is None and found.is_contiguous()


def test_masks_and_caches_are_refused(group):
    spread = ulysses.ulysses(Full().attend, group)
    query, key, value = qkv()
    positions = torch.arange(6)[None]
    with pytest.raises(UserError, match="honours no attention mask"):
        spread(nn.Module(), query, key, value, torch.ones(2, 6), position_ids=positions)
    with pytest.raises(UserError, match="continues a cache"):
        spread(nn.Module(), query[:, :, 5:], key, value, None, position_ids=positions[:, 5:])


def test_positions_are_gathered_once_a_forward_pass(group, monkeypatch):
    asked = []
    gather = ulysses.gather_tokens
    monkeypatch.setattr(
        ulysses, "gather_tokens", lambda x, group: asked.append(x) or gather(x, group)
    )
    model = network(num_hidden_layers=3).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    given = {"input_ids": tokens(2, 8), "position_ids": torch.arange(8).expand(2, 8)}
    expected = model(**given).logits
    wrap_attention(model.model, lambda attend: ulysses.ulysses(attend, group), "once")
    found = model(**given).logits
    found.sum().backward()
    assert torch.equal(found, expected) and len(asked) == 1
    model(**given | {"position_ids": torch.arange(8).repeat(2, 1)})
    assert len(asked) == 2


def test_wrapping_leaves_what_an_export_records(group):
    model = network(attention={"name": "streaming", "sinks": 2, "window": 4}, num_hidden_layers=2)
    before = model.config.to_dict()
    wrap_attention(model.get_decoder(), lambda attend: attend, "other")
    assert model.config._attn_implementation.startswith("other_longctx_streaming")
    assert model.config.to_dict() == before


@pytest.mark.parametrize(
    ("sp", "heads", "key_heads", "fits"),
    [
        (2, 4, 2, True), (4, 8, 2, True), (4, 8, 1, True), (3, 9, 3, True), (2, 6, 4, True),
        (2, 9, 3, False), (4, 12, 6, False), (8, 4, 4, False), (6, 12, 4, False),
    ],
)  # fmt: skip
def test_heads(sp, heads, key_heads, fits):
    if fits:
        ulysses.require_heads(sp, heads, key_heads)
        return
    with pytest.raises(UserError, match=f"parallel.sp={sp} "):
        ulysses.require_heads(sp, heads, key_heads)


def test_angles_that_need_the_whole_row():
    require_angles_by_position(
        network(rope={"name": "yarn", "factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0}).model,
        "parallel.sp=2",
    )
    # Our attention rotates by itself here, behind the exchange.
    dynamic = network(rope={"name": "dynamic_ntk", "factor": 2.0}).model
    require_angles_by_position(dynamic, "parallel.sp=2")
    dynamic.config._attn_implementation = "longctx_full"
    with pytest.raises(UserError, match=r"parallel\.sp=2: the angles of rope 'dynamic'"):
        require_angles_by_position(dynamic, "parallel.sp=2")


@pytest.mark.parametrize(
    ("one", "other", "common"),
    [
        ((0, 4), (2, 6), [2, 3]),
        ((2, 6), (0, 4), [2, 3]),
        ((0, 4), (4, 6), []),
        ((4, 6), (0, 3), []),
        ((0, 9), (2, 3), [2]),
    ],
)
def test_stretches(one, other, common):
    first, last = _common(one, other)
    assert list(range(first, last)) == common and one[0] <= first <= last <= one[1]
