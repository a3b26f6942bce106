"""Every attention method against its definition in float64: forward, gradient, packed, cached.

Methods are found, at the numbers of their examples (`tests/helpers/methods.py`); what is special to
a method stands in its own file.
"""

import dataclasses
import itertools

import pytest
import torch
import yaml

from longctx.attention.full import Full
from longctx.attention.method import EvictingMethod
from longctx.attention.ops import oracle
from longctx.errors import UserError
from longctx.models.choose import attention_method, method_class
from tests.helpers.methods import (
    ANYWHERE,
    CASES,
    EXAMPLES,
    INV_FREQ,
    LAYERS,
    NAMES,
    PADDINGS,
    POSITIONS,
    ROTARY,
    S,
    attention_layer,
    call,
    compare,
    complete,
    example,
    first,
    inputs,
    live_pairs,
    method_of,
)

KEY_HEADS = (4, 2, 1)


# --- what a method is made of ---------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_method_has_a_class_its_numbers_in_yaml_and_an_example(name, root):
    numbers = {field.name for field in dataclasses.fields(method_class(name))}
    conf = root / "conf" / "attention" / f"{name}.yaml"
    assert conf.is_file(), f"conf/attention/{name}.yaml is missing"
    given = yaml.safe_load(conf.read_text(encoding="utf-8"))
    assert given.pop("name") == name
    assert given.keys() <= numbers, "conf has what is no number of the method"
    assert example(name), f"tests/examples/attention/{name}.yaml is missing: sets of numbers"
    for numbers in example(name).values():
        assert attention_method(numbers).name == name


def test_every_example_is_of_a_method():
    assert {path.stem for path in EXAMPLES.iterdir()} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_example_stands_for_the_method(name):
    """It fits any number of key heads and a window of 12, and shows within 32 tokens."""
    method, full = attention_method(first(name)).for_window(12), Full()
    for key_heads in KEY_HEADS:
        of_model = method.for_layers(LAYERS, 4, key_heads)
        assert of_model.for_layers(LAYERS, 4, key_heads) == of_model
        i, j = torch.arange(32)[:, None], torch.arange(32)[None]
        heads = torch.arange(4)[:, None, None]
        differs = False
        for layer in range(LAYERS):
            live, distance = of_model.definition(i, j, layer, heads)
            plain, own = full.definition(i, j, layer, heads)
            differs |= bool((live != plain).any() or (live & (distance != own)).any())
        assert differs != of_model.plain


@pytest.mark.parametrize("case", CASES)
def test_the_definition_is_causal_and_every_query_sees_something(case):
    method = method_of(case)
    for layer in range(LAYERS):
        live = live_pairs(method, S, layer)
        assert not bool((live & ~torch.ones(S, S, dtype=torch.bool).tril()).any())
        assert bool(live.any(2).all())


@pytest.mark.parametrize("case", CASES)
def test_full_layers_and_layers_of_one_kind_are_alike(case):
    method, full = method_of(case), Full()
    i, j = torch.arange(S)[:, None], torch.arange(S)[None]
    seen = {}
    for layer in range(LAYERS):
        pairs = method.definition(i, j, layer, torch.arange(4)[:, None, None])
        live, distance = (x.expand(4, S, S) for x in pairs)
        if method.is_full(layer):
            assert torch.equal(live, full.definition(i, j, layer, None)[0].expand(4, S, S))
            assert torch.equal(distance[live], (i - j).expand(4, S, S)[live])
        other = seen.setdefault(method.kind(layer), (live, distance))
        assert torch.equal(live.double().mean(0), other[0].double().mean(0))


# --- what is counted ------------------------------------------------------------------------------


@pytest.mark.parametrize("key_heads", KEY_HEADS)
@pytest.mark.parametrize("case", CASES)
def test_counts_of_pairs_are_those_of_the_definition(case, key_heads):
    method = method_of(case, 4, key_heads)
    for length in (1, 7, 40, 131):
        total = 0.0
        for layer in range(LAYERS):
            count = live_pairs(method, length, layer).double().sum(2).mean(0)
            assert torch.equal(method.seen(torch.arange(length), layer).double(), count)
            total += float(count.sum())
        assert method.pairs(torch.arange(length), LAYERS) == total
    rows = torch.tensor([[3, 60], [17, 0]])  # any shape, as positions of a batch have it
    assert torch.equal(method.seen(rows, LAYERS - 1).double(), count[rows])


@pytest.mark.parametrize("case", CASES)
def test_a_cache_holds_everything_unless_the_method_evicts(case):
    method = method_of(case)
    for layer in range(LAYERS):
        held = [method.cache_tokens(past, layer) for past in range(60)]
        if method.is_full(layer) or not isinstance(method, EvictingMethod):
            assert held == list(range(60))
        assert all(a <= b <= n for n, (a, b) in enumerate(itertools.pairwise(held), 1))
    each = sum(method.cache_tokens(50, layer) for layer in range(LAYERS))
    assert method.cache_bytes(LAYERS, 2, 8, 50, element=4, rows=3) == 2 * 3 * 2 * 8 * 4 * each


@pytest.mark.parametrize("name", NAMES)
def test_shrunk_it_still_shows_within_a_row(name, root):
    """From the numbers that a user's run has, for any of its models."""
    given = yaml.safe_load((root / f"conf/attention/{name}.yaml").read_text(encoding="utf-8"))
    given = given if complete(name) else first(name)
    small = attention_method(given).shrunk(LAYERS, 32)
    assert small.name == name
    again = attention_method({"name": name, **dataclasses.asdict(small)})
    assert again == small
    i, j = torch.arange(64)[:, None], torch.arange(64)[None]
    heads = torch.arange(4)[:, None, None]
    for window, key_heads in ((16, 4), (32, 2)):
        tiny = small.for_window(window).for_layers(LAYERS, 4, key_heads)
        shows = False
        for layer in range(LAYERS):
            live, distance = tiny.definition(i, j, layer, heads)
            shows |= bool((live != (j <= i)).any() or (live & (distance != i - j)).any())
        assert shows != tiny.plain


# --- the fast path --------------------------------------------------------------------------------


def one_of_each_kind(method):
    """Indices of layers that are not alike."""
    return sorted({method.kind(index): index for index in range(LAYERS)}.values())


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("case", CASES)
def test_documents(case, positions, heads):
    method = method_of(case, *heads)
    for index in one_of_each_kind(method):
        begins = positions != "from position 17" or not method.from_beginning
        if begins or method.is_full(index):
            compare(method, inputs(*heads), POSITIONS[positions], index=index)
            continue
        with pytest.raises(UserError, match="start at position 0"):
            compare(method, inputs(*heads), POSITIONS[positions], index=index)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("positions", ["one document", "from position 17"])
@pytest.mark.parametrize("case", ANYWHERE)
def test_padding(case, positions, padding):
    compare(method_of(case, 4, 2), inputs(4, 2), POSITIONS[positions], PADDINGS[padding])


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("case", CASES)
def test_padding_with_the_positions_that_generate_makes(case, padding):
    mask = PADDINGS[padding]
    positions = (mask.long().cumsum(1) - 1).masked_fill(~mask, 0)
    compare(method_of(case, 4, 2), inputs(4, 2), positions, mask)


@pytest.mark.parametrize("new", [1, 2, 9, 25])
@pytest.mark.parametrize("padding", [None, "left", "alike"])
@pytest.mark.parametrize("case", CASES)
def test_cached(case, padding, new):
    mask = None if padding is None else PADDINGS[padding]
    positions = POSITIONS["one document"]
    if mask is not None:
        positions = (mask.long().cumsum(1) - 1).masked_fill(~mask, 0)
    method = method_of(case, 4, 2)
    for index in one_of_each_kind(method):
        compare(method, inputs(4, 2), positions, mask, new=new, index=index)


@pytest.mark.parametrize("case", CASES)
def test_appends_of_any_size_equal_one_prefill(case):
    q, k, v = inputs(4, 2)
    method, positions = method_of(case, 4, 2), POSITIONS["one document"]
    whole = call(method, q, k, v, positions)
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        seen = 0
        while seen < S:
            stop = min(S, seen + int(torch.randint(1, 10, (), generator=generator)))
            own = q[:, :, seen:stop], k[:, :, :stop], v[:, :, :stop]
            part = call(method, *own, positions[:, :stop])
            torch.testing.assert_close(part, whole[:, seen:stop], rtol=0, atol=1e-13)
            seen = stop


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("case", CASES)
def test_only_some_heads_of_a_model(case, key_heads):
    """A rank of a sequence-parallel group holds some heads, and says which."""
    q, k, v = inputs(4, key_heads)
    method, half = method_of(case, 4, key_heads), key_heads // 2
    angles = method.key_positions(POSITIONS["one row of positions"])[:, None, :, None] * INV_FREQ
    q, k = oracle.rotate(q, angles), oracle.rotate(k, angles)
    for new in (S, 6, 1):
        own = {"position_ids": POSITIONS["one row of positions"][:, S - new :], "rotary": ROTARY}
        for index in one_of_each_kind(method):
            module = attention_layer(index)
            whole = method.attend(module, q[:, :, S - new :], k, v, None, **own)[0]
            some = q[:, 2:, S - new :], k[:, half:], v[:, half:]
            heads = torch.arange(half, key_heads)
            part = method.attend(module, *some, None, **own, key_heads=heads)[0]
            torch.testing.assert_close(part, whole[:, :, 2:], rtol=0, atol=1e-14)
            if method.expected_key_heads() is not None:
                with pytest.raises(UserError, match="which ones"):
                    method.attend(module, *some, None, **own)


@pytest.mark.parametrize("case", CASES)
def test_scaling(case):
    compare(method_of(case, 4, 2), inputs(4, 2), POSITIONS["packed"], scaling=0.3)


@pytest.mark.parametrize("case", CASES)
def test_padding_is_zero_and_passes_no_gradient(case):
    mask = PADDINGS["right"]
    tensors = [x.requires_grad_() for x in inputs(4, 2)]
    out = call(method_of(case, 4, 2), *tensors, POSITIONS["one document"], mask)
    assert (out[~mask] == 0).all()
    for grad in torch.autograd.grad(out.sum(), tensors):
        assert (grad.transpose(1, 2)[~mask] == 0).all()


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_document_that_starts_in_a_cached_row_is_refused(case):
    method, (q, k, v) = method_of(case, 4, 2), inputs(4, 2)
    positions = torch.cat([torch.arange(S - 1), torch.zeros(1, dtype=torch.long)])[None]
    with pytest.raises(UserError, match="continues a cache"):
        call(method, q[:, :, -1:], k, v, positions)
    positions = torch.cat([torch.arange(S - 2), torch.tensor([0, 1])])[None]
    with pytest.raises(UserError, match="continues a cache"):
        call(method, q[:, :, -4:], k, v, positions)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("rest", "says"),
    [({"sliding_window": 4}, "sliding_window"), ({"is_causal": False}, "causal")],
)
def test_what_is_not_honoured_raises(case, rest, says):
    with pytest.raises(UserError, match=says):
        call(method_of(case, 4, 2), *inputs(4, 2), POSITIONS["one document"], **rest)


@pytest.mark.parametrize("case", CASES)
def test_dropout_is_refused_unless_the_layer_is_full(case):
    method = method_of(case, 4, 2)
    for index in one_of_each_kind(method):
        for new in (S, 1):
            q, k, v = inputs(4, 2)
            given = (method, q[:, :, S - new :], k, v, POSITIONS["one document"])
            if method.is_full(index):
                call(*given, index=index, dropout=0.1)
                continue
            with pytest.raises(UserError, match="no attention dropout"):
                call(*given, index=index, dropout=0.1)


@pytest.mark.parametrize("case", CASES)
def test_a_method_that_turns_queries_needs_the_rotary_module(case):
    method, (q, k, v) = method_of(case, 4, 2), inputs(4, 2)
    given = attention_layer(), q, k, v, None
    positions = POSITIONS["one row of positions"]
    if not method.turns_queries:
        method.attend(*given, position_ids=positions)
        return
    with pytest.raises(UserError, match="turns queries"):
        method.attend(*given, position_ids=positions)
