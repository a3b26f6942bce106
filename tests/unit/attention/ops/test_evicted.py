"""LongGen: golden block rows, what may be evicted, layers and their reach, sizes, bad input."""

import itertools

import pytest
import torch
from torch import nn

from longctx.attention import longgen_blocks
from longctx.attention.full import Full
from longctx.attention.longgen_blocks import LongGenBlocks
from longctx.attention.longgen_window import LongGenWindow
from longctx.attention.ops import evicted as evicted_ops
from longctx.attention.ops import full_layers, oracle, parts, sinks_window
from longctx.errors import UserError
from longctx.models import load
from tests.helpers.methods import INV_FREQ, POSITIONS, B, D, S, call, compare, inputs

TOY = LongGenBlocks(block_size=1, local_blocks=2, stride=4).for_layers(3, 4, 2)
TOY_FROM_1 = LongGenBlocks(block_size=1, local_blocks=2, stride=4, offset=1).for_layers(3, 4, 2)
PATTERNS = {
    "window": LongGenWindow(3, 7),
    "window without sinks": LongGenWindow(0, 5),
    "window of one": LongGenWindow(2, 1),
    "blocks": LongGenBlocks(3, 3, 4),
    "blocks from 1": LongGenBlocks(4, 2, 8, offset=1),
    "blocks of one": LongGenBlocks(2, 1, 5),
    "blocks, fewer strides than heads": LongGenBlocks(2, 2, 3, offset=2),
    "blocks alike": LongGenBlocks(3, 2, 2, heads_share=True),
}


def pattern(name, heads=4, key_heads=4):
    return PATTERNS[name].for_layers(3, heads, key_heads)


def seen(method, length, heads=4, layer=0):
    """`[heads length length]`, which pairs attend."""
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    live, _ = method.definition(i, j, layer, torch.arange(heads)[:, None, None])
    return live.expand(heads, length, length)


def blocks_of(method, row, key_head):
    """Key blocks that some query of block `row` sees; two query heads share a key head."""
    size = method.block_size
    live = seen(method, 10 * size)[2 * key_head, row * size : (row + 1) * size].any(0)
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
    live = seen(method, 40)
    assert torch.equal(live[0], live[1]) and torch.equal(live[2], live[3])
    assert not torch.equal(live[0], live[2])


def only_shrinks(live):
    """Whether no query needs a key that an earlier one could see and did not need any more.

    Args:
        live: `[heads n n]`.
    """
    later = live.flip(1).cummax(1).values.flip(1)  # some query from here on needs it
    needed = live | ~torch.ones_like(live[0]).tril()
    return bool((needed >= later).all())


@pytest.mark.parametrize("name", PATTERNS)
def test_what_is_not_needed_once_is_never_needed_again(name):
    assert only_shrinks(seen(pattern(name), 60))


def test_a_stride_relative_to_the_query_would_need_keys_again():
    i, j = torch.arange(60)[:, None] // 3, torch.arange(60)[None] // 3
    relative = ((i - j < 3) | ((i - j) % 4 == 0)) & torch.ones(60, 60, dtype=torch.bool).tril()
    assert not only_shrinks(relative[None])


@pytest.mark.parametrize("name", PATTERNS)
def test_kept_positions_are_what_later_queries_need(name):
    method, length, heads = pattern(name), 70, torch.arange(4)
    live = seen(method, length)
    for past in range(1, 46):
        kept = method.kept_positions(torch.tensor([past]), heads).expand(1, 4, -1)[0]
        assert kept.shape[1] == method.kept_tokens(past) <= past
        for head in range(4):
            needed = live[head, past:, :past].any(0).nonzero()[:, 0].tolist()
            held = [p for p in kept[head].tolist() if p >= 0]
            assert held == sorted(held) and (kept[head] < 0).sum() == len(kept[head]) - len(held)
            assert (kept[head].diff()[kept[head].diff() != 0] > 0).all()
            spare = set(held) - set(needed)  # the oldest of a window, which a ring overwrites
            assert set(needed) <= set(held) and len(spare) <= (1 if "window" in name else 0)


@pytest.mark.parametrize("name", PATTERNS)
def test_kept_tokens_fit_rows_of_any_length(name):
    """The row with the most tokens need not be the one that keeps the most."""
    method, past = pattern(name), torch.arange(1, 60)
    kept = method.kept_positions(past, torch.arange(4))
    for row, count in enumerate(past.tolist()):
        alone = method.kept_positions(past[row : row + 1], torch.arange(4))[0]
        assert torch.equal(kept[row, :, kept.shape[2] - alone.shape[1] :], alone)
        assert (kept[row, :, : kept.shape[2] - alone.shape[1]] == -1).all()
        assert method.kept_tokens(count) <= kept.shape[2]


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("name", PATTERNS)
def test_counts_of_seen_keys_are_those_of_the_definition(name, key_heads):
    method = pattern(name, 4, key_heads)
    for length in (1, 7, 40, 131):
        count = seen(method, length).double().sum(2).mean(0)
        assert torch.equal(method.seen(torch.arange(length), 0).double(), count)
    rows = torch.tensor([[3, 60], [17, 0]])  # any shape, as positions of a batch have it
    assert torch.equal(method.seen(rows, 0).double(), count[rows])


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


def test_only_some_heads_of_a_model():
    """A rank of a sequence-parallel group holds some heads, and says which."""
    q, k, v = inputs(4, 4)
    method = LongGenBlocks(2, 3, 4).for_layers(3, 4, 4)
    layer = nn.Module()
    layer.layer_idx = 0
    for new in (S, 6):
        own = POSITIONS["one row of positions"][:, S - new :]
        whole = method.attend(layer, q[:, :, S - new :], k, v, None, position_ids=own)[0]
        some = [x[:, 2:] for x in (q[:, :, S - new :], k, v)]
        heads = torch.tensor([2, 3])
        part = method.attend(layer, *some, None, position_ids=own, key_heads=heads)[0]
        torch.testing.assert_close(part, whole[:, :, 2:], rtol=0, atol=1e-14)
        with pytest.raises(UserError, match="which ones"):
            method.attend(layer, *some, None, position_ids=own)


# --- a cache that has evicted ---------------------------------------------------------------------


def evicted(method, k, past):
    """What a cache returns of `past` `[b]` tokens and keys `[b hk n d]` in true order."""
    where = method.kept_positions(past, torch.arange(k.shape[1])).expand(len(k), k.shape[1], -1)
    held = k.gather(2, where.clamp(min=0)[..., None].expand(-1, -1, -1, D))
    return held.masked_fill(where[..., None] < 0, 1e4)  # arbitrary, and felt if it is read


@pytest.mark.parametrize("name", PATTERNS)
def test_appends_to_an_evicting_cache_are_rows_of_one_prefill(name):
    q, k, v = inputs(4, 2)
    method, positions = pattern(name, 4, 2), POSITIONS["one document"]
    whole = call(method, q, k, v, positions)
    layer = nn.Module()
    for layer.layer_idx, new in ((0, 1), (2, 1), (0, 2), (2, 13)):
        for past in range(1, S - new + 1, 1 if new == 1 else 3):
            own = slice(past, past + new)
            keys, values = (
                torch.cat((evicted(method, x, torch.full((B,), past)), x[:, :, own]), dim=2)
                for x in (rotated(k), v)
            )
            given = rotated(q)[:, :, own], keys, values
            part = method.attend(layer, *given, None, position_ids=positions[:, own])[0]
            torch.testing.assert_close(part, whole[:, own], rtol=0, atol=1e-13)


def rotated(x):
    return oracle.rotate(x, torch.arange(S)[:, None] * INV_FREQ)


@pytest.mark.parametrize("rows", [1, 4, 512])
@pytest.mark.parametrize("name", PATTERNS)
def test_rows_of_different_length_in_an_evicting_cache(name, rows, monkeypatch):
    monkeypatch.setattr(evicted_ops, "ROWS", rows)
    q, k, v = inputs(4, 2)
    method, layer, total = pattern(name, 4, 2), nn.Module(), 33
    layer.layer_idx = 0
    whole = call(method, q, k, v, POSITIONS["one document"])
    for new, past in itertools.product((1, 6), ([27, 26, 14], [33, 21, 0], [9, 5, 8])):
        before = torch.tensor(past)
        mask = torch.arange(total)[None] >= total - before[:, None]
        mask = torch.cat((mask, torch.ones(B, new, dtype=torch.bool)), dim=1)
        own = before[:, None] + torch.arange(new)
        at = own[:, None, :, None].expand(-1, 4, -1, D)
        q_own, k_own, v_own = (
            x.gather(2, at[:, : x.shape[1]]) for x in (rotated(q), rotated(k), v)
        )
        keys = torch.cat((evicted(method, rotated(k), before), k_own), dim=2)
        values = torch.cat((evicted(method, v, before), v_own), dim=2)
        part = method.attend(layer, q_own, keys, values, mask, position_ids=own)[0]
        for row, first in enumerate(past):
            want = whole[row, first : first + new]
            torch.testing.assert_close(part[row], want, rtol=0, atol=1e-13)


def test_a_ring_is_read_in_any_order_and_without_a_mask(monkeypatch):
    q, k, v = inputs(4, 2)
    method, layer, past = LongGenWindow(3, 7, [1]), nn.Module(), 30
    whole = call(method, q, k, v, POSITIONS["one document"])
    held = torch.tensor([0, 1, 2, 28, 29, 30, 24, 25, 26, 27])
    masks = []
    plain = evicted_ops.causal.sdpa
    monkeypatch.setattr(
        evicted_ops.causal, "sdpa", lambda *a, mask=None, **n: masks.append(mask) or plain(*a, **n)
    )
    own = torch.tensor([[past]])
    for layer.layer_idx, mask in itertools.product((0, 2), (None, torch.ones(B, 31))):
        given = rotated(q)[:, :, past : past + 1], rotated(k)[:, :, held], v[:, :, held]
        part = method.attend(layer, *given, mask, position_ids=own.expand(B, 1))[0]
        torch.testing.assert_close(part, whole[:, past : past + 1], rtol=0, atol=1e-13)
    assert masks == [None] * 4


@pytest.mark.parametrize("name", PATTERNS)
def test_a_cache_of_another_size_is_refused(name):
    q, k, v = inputs(4, 2)
    own = torch.tensor([[30, 31]])
    layer = nn.Module()
    with pytest.raises(UserError, match="continues a cache with 28 keys after 30"):
        pattern(name, 4, 2).attend(
            layer, q[:, :, :2], k[:, :, :30], v[:, :, :30], None, position_ids=own
        )


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


@pytest.mark.parametrize("name", PATTERNS)
def test_dropout_is_refused_in_sparse_layers(name):
    with pytest.raises(UserError, match="no attention dropout"):
        call(pattern(name, 4, 2), *inputs(4, 2), POSITIONS["one document"], dropout=0.1)
    q, k, v = inputs(4, 2)
    with pytest.raises(UserError, match="no attention dropout"):
        call(pattern(name, 4, 2), q[:, :, -1:], k, v, POSITIONS["one document"], dropout=0.1)
