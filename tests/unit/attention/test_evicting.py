"""Every method that evicts: what it keeps is what later queries need, and enough to attend.

Methods are found, at the numbers of their examples (`tests/helpers/methods.py`).
"""

import itertools

import pytest
import torch

from longctx.attention.method import EvictingMethod
from longctx.attention.ops import evicted, oracle
from longctx.errors import UserError
from tests.helpers.methods import (
    EVICTING,
    EVICTING_CASES,
    INV_FREQ,
    LAYERS,
    POSITIONS,
    B,
    D,
    S,
    attention_layer,
    call,
    first,
    inputs,
    live_pairs,
    method_of,
)


def sparse_layers(method):
    return [index for index in range(LAYERS) if not method.is_full(index)]


def test_some_method_evicts():
    assert len(EVICTING) >= 2


@pytest.mark.parametrize("name", EVICTING)
def test_the_first_example_has_sparse_layers_and_a_full_one(name):
    method = method_of(first(name))
    assert 0 < len(sparse_layers(method)) < LAYERS


# --- what is kept ---------------------------------------------------------------------------------


def only_shrinks(live):
    """Whether no query needs a key that an earlier one could see and did not need any more.

    Args:
        live: `[heads n n]`.
    """
    later = live.flip(1).cummax(1).values.flip(1)  # some query from here on needs it
    needed = live | ~torch.ones_like(live[0]).tril()
    return bool((needed >= later).all())


@pytest.mark.parametrize("case", EVICTING_CASES)
def test_what_is_not_needed_once_is_never_needed_again(case):
    method = method_of(case)
    for index in sparse_layers(method):
        assert only_shrinks(live_pairs(method, 60, index))


def test_a_stride_relative_to_the_query_would_need_keys_again():
    i, j = torch.arange(60)[:, None] // 3, torch.arange(60)[None] // 3
    relative = ((i - j < 3) | ((i - j) % 4 == 0)) & torch.ones(60, 60, dtype=torch.bool).tril()
    assert not only_shrinks(relative[None])


@pytest.mark.parametrize("case", EVICTING_CASES)
def test_what_key_heads_see_is_the_definition(case):
    method = method_of(case, 4, 4)
    i, j = torch.arange(S)[:, None], torch.arange(S)[None]
    seen = method.sees(i, j, torch.arange(4)[:, None, None]).expand(4, S, S)
    for index in sparse_layers(method):
        assert torch.equal(seen, live_pairs(method, S, index))


@pytest.mark.parametrize("case", EVICTING_CASES)
def test_kept_positions_are_what_later_queries_need(case):
    method, length, heads = method_of(case), 70, torch.arange(4)
    live = live_pairs(method, length, sparse_layers(method)[0])
    for past in range(1, 46):
        kept = method.kept_positions(torch.tensor([past]), heads).expand(1, 4, -1)[0]
        assert kept.shape[1] == method.kept_tokens(past) <= past
        for head in range(4):
            needed = live[head, past:, :past].any(0).nonzero()[:, 0].tolist()
            held = [p for p in kept[head].tolist() if p >= 0]
            assert held == sorted(held) and (kept[head] < 0).sum() == len(kept[head]) - len(held)
            assert (kept[head].diff()[kept[head].diff() != 0] > 0).all()
            spare = set(held) - set(needed)  # the oldest of a window, which a ring overwrites
            assert set(needed) <= set(held)
            assert len(spare) <= (0 if method.ring() is None else 1)


@pytest.mark.parametrize("case", EVICTING_CASES)
def test_kept_tokens_fit_rows_of_any_length(case):
    """The row with the most tokens need not be the one that keeps the most."""
    method, past = method_of(case), torch.arange(1, 60)
    kept = method.kept_positions(past, torch.arange(4))
    for row, count in enumerate(past.tolist()):
        alone = method.kept_positions(past[row : row + 1], torch.arange(4))[0]
        assert torch.equal(kept[row, :, kept.shape[2] - alone.shape[1] :], alone)
        assert (kept[row, :, : kept.shape[2] - alone.shape[1]] == -1).all()
        assert method.kept_tokens(count) <= kept.shape[2]


@pytest.mark.parametrize("case", EVICTING_CASES)
def test_up_to_whole_a_query_sees_all_that_is_kept(case):
    method = method_of(case)
    for past in range(60):
        kept = method.kept_positions(torch.tensor([past]), torch.arange(4)).expand(1, 4, -1)
        if kept.shape[2] + 1 <= method.whole:
            seen = method.sees(torch.tensor(past), kept, torch.arange(4)[None, :, None])
            assert bool(seen.expand(kept.shape)[kept >= 0].all())


# --- attention over what is kept ------------------------------------------------------------------


def rotated(x):
    return oracle.rotate(x, torch.arange(S)[:, None] * INV_FREQ)


def kept_of(method, k, past):
    """What a cache returns of `past` `[b]` tokens and keys `[b hk n d]` in true order."""
    where = method.kept_positions(past, torch.arange(k.shape[1])).expand(len(k), k.shape[1], -1)
    held = k.gather(2, where.clamp(min=0)[..., None].expand(-1, -1, -1, D))
    return held.masked_fill(where[..., None] < 0, 1e4)  # arbitrary, and felt if it is read


@pytest.mark.parametrize("case", EVICTING_CASES)
def test_appends_to_an_evicting_cache_are_rows_of_one_prefill(case):
    q, k, v = inputs(4, 2)
    method, positions = method_of(case, 4, 2), POSITIONS["one document"]
    sparse = sparse_layers(method)
    for index, new in ((sparse[0], 1), (sparse[-1], 1), (sparse[0], 2), (sparse[-1], 13)):
        whole = call(method, q, k, v, positions, index=index)
        for past in range(1, S - new + 1, 1 if new == 1 else 3):
            own = slice(past, past + new)
            keys, values = (
                torch.cat((kept_of(method, x, torch.full((B,), past)), x[:, :, own]), dim=2)
                for x in (rotated(k), v)
            )
            given = rotated(q)[:, :, own], keys, values, None
            part = method.attend(attention_layer(index), *given, position_ids=positions[:, own])[0]
            torch.testing.assert_close(part, whole[:, own], rtol=0, atol=1e-13)


@pytest.mark.parametrize("rows", [1, 4, 512])
@pytest.mark.parametrize("case", EVICTING_CASES)
def test_rows_of_different_length_in_an_evicting_cache(case, rows, monkeypatch):
    monkeypatch.setattr(evicted, "ROWS", rows)
    q, k, v = inputs(4, 2)
    method, total = method_of(case, 4, 2), 33
    index = sparse_layers(method)[0]
    whole = call(method, q, k, v, POSITIONS["one document"], index=index)
    for new, past in itertools.product((1, 6), ([27, 26, 14], [33, 21, 0], [9, 5, 8])):
        before = torch.tensor(past)
        mask = torch.arange(total)[None] >= total - before[:, None]
        mask = torch.cat((mask, torch.ones(B, new, dtype=torch.bool)), dim=1)
        own = before[:, None] + torch.arange(new)
        at = own[:, None, :, None].expand(-1, 4, -1, D)
        q_own, k_own, v_own = (
            x.gather(2, at[:, : x.shape[1]]) for x in (rotated(q), rotated(k), v)
        )
        keys = torch.cat((kept_of(method, rotated(k), before), k_own), dim=2)
        values = torch.cat((kept_of(method, v, before), v_own), dim=2)
        given = attention_layer(index), q_own, keys, values, mask
        part = method.attend(*given, position_ids=own)[0]
        for row, begin in enumerate(past):
            want = whole[row, begin : begin + new]
            torch.testing.assert_close(part[row], want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("case", EVICTING_CASES)
def test_a_ring_is_read_in_any_order_and_without_a_mask(case, monkeypatch):
    q, k, v = inputs(4, 2)
    method, past = method_of(case, 4, 2), 30
    if method.ring() is None:
        return
    sinks, window = method.ring()
    assert sinks + window == method.whole
    late = list(range(past - window + 1, past + 1))
    turned = past % window
    held = torch.tensor([*range(sinks), *late[turned:], *late[:turned]])
    masks, plain = [], evicted.causal.sdpa
    monkeypatch.setattr(
        evicted.causal, "sdpa", lambda *a, mask=None, **n: masks.append(mask) or plain(*a, **n)
    )
    own, calls = torch.tensor([[past]]), 0
    for index, mask in itertools.product(sparse_layers(method), (None, torch.ones(B, 31))):
        whole = call(method, q, k, v, POSITIONS["one document"], index=index)
        masks.clear()
        given = rotated(q)[:, :, past : past + 1], rotated(k)[:, :, held], v[:, :, held], mask
        layer = attention_layer(index)
        part = method.attend(layer, *given, position_ids=own.expand(B, 1))[0]
        torch.testing.assert_close(part, whole[:, past : past + 1], rtol=0, atol=1e-13)
        assert masks == [None]
        calls += 1
    assert calls


@pytest.mark.parametrize("case", EVICTING_CASES)
def test_a_cache_of_another_size_is_refused(case):
    q, k, v = inputs(4, 2)
    method, own = method_of(case, 4, 2), torch.tensor([[30, 31]])
    layer = attention_layer(sparse_layers(method)[0])
    with pytest.raises(UserError, match="continues a cache with 28 keys after 30"):
        method.attend(layer, q[:, :, :2], k[:, :, :30], v[:, :, :30], None, position_ids=own)


def test_the_contract_asks_for_what_an_evicting_method_must_give():
    assert EvictingMethod.__abstractmethods__ == {
        "definition", "is_full", "sees", "whole", "kept_tokens", "kept_positions",
    }  # fmt: skip
