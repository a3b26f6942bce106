"""LongGen: golden block rows, how calls are cut, layers and their reach, sizes, bad input."""

import pytest
import torch

from longctx.attention import longgen_blocks
from longctx.attention.full import Full
from longctx.attention.longgen_blocks import LongGenBlocks
from longctx.attention.longgen_window import LongGenWindow
from longctx.attention.ops import full_layers, parts, sinks_window
from longctx.errors import UserError
from longctx.models import load
from tests.helpers.methods import POSITIONS, S, call, compare, inputs, live_pairs

TOY = LongGenBlocks(block_size=1, local_blocks=2, stride=4).for_layers(3, 4, 2)
TOY_FROM_1 = LongGenBlocks(block_size=1, local_blocks=2, stride=4, offset=1).for_layers(3, 4, 2)


def blocks_of(method, row, key_head):
    """Key blocks that some query of block `row` sees; two query heads share a key head."""
    size = method.block_size
    live = live_pairs(method, 10 * size, 0)[2 * key_head, row * size : (row + 1) * size].any(0)
    return live.view(-1, size).any(1).nonzero()[:, 0].tolist()


# --- which pairs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize(
    ("offset", "row", "first", "second"),
    [
        (0, 9, [0, 4, 8, 9], [2, 6, 8, 9]),
        (0, 5, [0, 4, 5], [2, 4, 5]),
        (1, 9, [3, 7, 8, 9], [1, 5, 8, 9]),
        (1, 5, [3, 4, 5], [1, 4, 5]),
    ],
)
def test_rows_of_the_public_kernel(size, offset, row, first, second):
    method = LongGenBlocks(size, 2, 4, offset).for_layers(3, 4, 2)
    assert [blocks_of(method, row, head) for head in (0, 1)] == [first, second]
    shared = LongGenBlocks(size, 2, 4, offset, heads_share=True).for_layers(3, 4, 2)
    assert [blocks_of(shared, row, head) for head in (0, 1)] == [first, first]


@pytest.mark.parametrize("method", [TOY, TOY_FROM_1])
def test_heads_that_share_keys_share_the_pattern(method):
    live = live_pairs(method, 40, 0)
    assert torch.equal(live[0], live[1]) and torch.equal(live[2], live[3])
    assert not torch.equal(live[0], live[2])


# --- the fast path --------------------------------------------------------------------------------

CUTS = [(2, 4, 3), (1, 3, 2), (128, 2, 99), (4, 40, 1)]  # LEAF, ROWS, CHUNKS: many calls of few


@pytest.mark.parametrize("positions", ["one document", "packed"])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize(
    "method",
    [LongGenWindow(3, 9), LongGenWindow(2, 14), LongGenBlocks(2, 5, 3), LongGenBlocks(1, 9, 4),
     LongGenBlocks(3, 4, 2, heads_share=True), LongGenBlocks(2, 1, 3)],
    ids=str,
)  # fmt: skip
def test_any_cut_gives_the_definition(method, cuts, positions, monkeypatch):
    monkeypatch.setattr(parts, "LEAF", cuts[0])
    for module in (sinks_window, longgen_blocks):
        monkeypatch.setattr(module, "ROWS", cuts[1])
        monkeypatch.setattr(module, "CHUNKS", cuts[2])
    compare(method, inputs(4, 2), POSITIONS[positions])


def scored(found, n):
    """How often the parts score each pair, `[n n]`, for one key head."""
    count = torch.zeros(n, n)
    for block in found:
        for part in block.leaves().parts:
            at = torch.arange(n)
            rows = part.cut(at[None, None, part.of(block, 1)[2]])
            keys = part.cut(at[None, None, part.start : part.stop], keys=True)
            for own, other in zip(rows[:, 0], keys[:, 0], strict=True):
                square = torch.ones(len(own), len(other))
                square = square.tril() if part.causal else square
                count[own[:, None], other[None]] += square
    return count


def test_the_kernel_scores_little_that_is_not_seen():
    """A long document at sizes in use: calls, and pairs that a causal call scores in vain."""
    n, size = 4000, 1024
    found = list(sinks_window.blocks(n, n, size - 64, 64, None, None))
    live = (torch.arange(n)[:, None] - torch.arange(n) < size - 64) | (torch.arange(n) < 64)
    assert torch.equal(scored(found, n), live.tril().float())
    calls = [part for block in found for part in block.leaves().parts]
    vain = sum(x.stop - x.start for x in calls if x.causal) * parts.LEAF / 2
    assert max(x.fold or x.stop - x.start for x in calls if x.causal) <= parts.LEAF
    assert len(calls) < 40 and vain <= parts.LEAF * n  # half a leaf at either end of the window


@pytest.mark.parametrize("method", [LongGenWindow(8, S - 8), LongGenBlocks(7, 6, 2)], ids=str)
@pytest.mark.parametrize("positions", ["one document", "packed"])
def test_documents_that_fit_are_full_attention_bit_for_bit(method, positions):
    q, k, v = inputs(4, 2)
    ours = call(method, q, k, v, POSITIONS[positions])
    assert torch.equal(ours, call(Full(), q, k, v, POSITIONS[positions]))


def test_full_layers_are_full_attention_bit_for_bit():
    q, k, v = inputs(4, 2)
    method = LongGenWindow(1, 2, [0])
    for new in (S, 5, 1):
        tensors = (q[:, :, S - new :], k, v, POSITIONS["packed" if new == S else "one document"])
        assert torch.equal(call(method, *tensors), call(Full(), *tensors))


# --- layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "full"),
    [(1, [0]), (2, [0, 1]), (3, [1]), (4, [1, 2]), (6, [2, 3]), (32, list(range(10, 22))),
     (80, list(range(26, 54)))],
)  # fmt: skip
def test_hourglass(layers, full):
    assert full_layers.plan(layers) == full
    for method in (LongGenWindow(), LongGenBlocks()):
        chosen = method.for_layers(layers, 4, 2)
        assert chosen.full_layers == full
        assert [i for i in range(layers) if chosen.is_full(i)] == full
        assert chosen.for_layers(layers, 4, 2) == chosen


LLAMA = {
    "model_type": "llama", "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}  # fmt: skip
SPARSE = {
    "window": {"name": "longgen_window", "sink_tokens": 3, "window_tokens": 8},
    "blocks": {"name": "longgen_blocks", "block_size": 4, "local_blocks": 2, "stride": 16,
               "offset": 8, "heads_share": True},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "never"),
    [
        # 3 layers back of 7 tokens each; the sinks, which see sinks alone, at once
        ("window", range(3, 63 - 3 * 7)),
        # 64 tokens are blocks 0 to 15: 12 to 15 by their neighbours, and 6 to 8 by the strided 8
        ("blocks", [*range(6 * 4), *range(9 * 4, 12 * 4)]),
    ],
)
def test_reach(name, never):
    """Sparse layers see a window each; one full layer in the middle sees everything."""
    tokens = torch.randint(61, (1, 64), generator=torch.Generator().manual_seed(0))
    others = tokens.repeat(64, 1)
    others.diagonal().add_(1).remainder_(61)
    for full in ([], "hourglass", [0, 1, 2]):
        model = load.build_model(
            LLAMA, attention={**SPARSE[name], "full_layers": full}, dtype=torch.float64
        )
        with torch.no_grad():
            logits = model(torch.cat((tokens, others))).logits[:, -1]
        reached = (logits[1:] - logits[0]).abs().amax(1) > 1e-12
        expected = torch.ones(64, dtype=torch.bool)
        expected[list(never)] = full != []
        assert torch.equal(reached, expected)


def test_a_short_document_is_the_dense_model_bit_for_bit():
    tokens = torch.randint(61, (2, 11), generator=torch.Generator().manual_seed(0))
    dense = load.build_model(LLAMA, dtype=torch.float64)
    hybrid = load.build_model(LLAMA, attention=SPARSE["window"], dtype=torch.float64)
    wide = {"name": "longgen_window", "sink_tokens": 0, "window_tokens": 40}
    long = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(hybrid(tokens).logits, dense(tokens).logits)
        assert not torch.equal(hybrid(long).logits, dense(long).logits)
        hybrid = load.build_model(LLAMA, attention=wide, dtype=torch.float64)
        assert torch.equal(hybrid(long).logits, dense(long).logits)


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "full", "kept", "saved"),
    [(32, 12, 2048, 61.52), (32, 12, 1024, 62.01), (32, 11, 2048, 64.60), (80, 28, 2048, 63.98)],
)
def test_saved_cache(layers, full, kept, saved):
    chosen = list(range(full))
    hybrid, dense = (
        LongGenWindow(64, kept - 64, x).for_layers(layers, 8, 8)
        for x in (chosen, list(range(layers)))
    )
    held, whole = (x.cache_bytes(layers, 8, 128, 131072) for x in (hybrid, dense))
    assert round(100 * (1 - held / whole), 2) == saved


def test_cache_bytes_of_llama_2():
    method = LongGenWindow().for_layers(32, 32, 32)
    assert method.cache_bytes(32, 32, 128, 131072) / 2**30 == 24.625
    dense = LongGenWindow(full_layers=list(range(32))).for_layers(32, 32, 32)
    assert dense.cache_bytes(32, 32, 128, 131072) / 2**30 == 64
    assert method.cache_bytes(32, 32, 128, 100) == dense.cache_bytes(32, 32, 128, 100)


def test_default_blocks_keep_a_64th_of_128k():
    method = LongGenBlocks().for_layers(32, 32, 32)
    kept = [method.kept_tokens(131072), method.kept_tokens(131071)]
    assert kept == [2047, 2047]


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LongGenWindow(sink_tokens=-1), "sink_tokens=-1"),
        (lambda: LongGenWindow(window_tokens=0), "window_tokens=0"),
        (lambda: LongGenWindow(0, 1), "window_tokens must be at least 2"),
        (lambda: LongGenWindow(full_layers="middle"), "full_layers='middle'"),
        (lambda: LongGenWindow(full_layers=[1, True]), "not a list of layer indices"),
        (lambda: LongGenWindow(full_layers=3), "not a list of layer indices"),
        (lambda: LongGenWindow(full_layers=[1, 2, 1]), "layer 1 more than once"),
        (lambda: LongGenWindow(full_layers=[5]).for_layers(5, 4, 4), "has 5, and .* 0 to 4"),
        (lambda: LongGenBlocks(full_layers=[-1]).for_layers(5, 4, 4), "has -1, and .* 0 to 4"),
        (lambda: LongGenBlocks(block_size=0), "block_size=0"),
        (lambda: LongGenBlocks(local_blocks=0), "local_blocks=0"),
        (lambda: LongGenBlocks(stride=0), "stride=0"),
        (lambda: LongGenBlocks(1, 1), "at least 2"),
        (lambda: LongGenBlocks(stride=4, offset=4), "offset=4 must be from 0"),
        (lambda: LongGenBlocks().for_layers(3, 4, 3), "3 key heads do not divide 4"),
        (lambda: LongGenBlocks(key_heads=8).for_layers(3, 4, 4), "key_heads=8, and .* 4"),
    ],
)
def test_bad_numbers_are_one_line(make, says):
    with pytest.raises(UserError, match=says) as error:
        make()
    assert "\n" not in str(error.value)
