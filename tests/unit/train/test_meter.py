from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from longctx.attention.full import Full
from longctx.batch import Batch
from longctx.models.choose import attention_method
from longctx.models.export.restore import recorded
from longctx.train import meter
from tests.helpers.methods import LAYERS, NAMES, first, live_pairs
from tests.helpers.networks import network


class Net(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.up, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
        self.head = nn.Linear(4, 10, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def test_matrices_once_and_no_input_embedding():
    assert meter.matmul_weights(Net(tied=False)) == 4 * 6 + 4 * 10
    assert meter.matmul_weights(Net(tied=True)) == 4 * 6 + 4 * 10


def test_attention_width():
    config = SimpleNamespace(num_attention_heads=4, num_hidden_layers=3, hidden_size=64)
    assert meter.attention_width(SimpleNamespace(config=config)) == 3 * 64
    config.head_dim = 8
    assert meter.attention_width(SimpleNamespace(config=config)) == 3 * 4 * 8


def rows(*lengths):
    """A batch of one row of documents of these lengths."""
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return Batch(positions, positions, positions)


def test_flops_of_two_documents_in_a_row():
    # causal, forward and twice that backward: QK^T and PV are 2 multiply-adds a pair and width
    attention = sum(3 * 2 * 2 * n * (n + 1) / 2 * 7 for n in (3, 2))
    counts = meter.Counts(100, 7, Full(), 1)
    assert meter.batch_flops(counts, rows(3, 2)) == 3 * 2 * 100 * 5 + attention
    twice = replace(counts, layers=2)
    assert meter.batch_flops(twice, rows(3, 2)) == 3 * 2 * 100 * 5 + 2 * attention


def test_flops_of_a_batch_are_the_sum_of_its_rows():
    one = rows(6)
    three = Batch(*(x.repeat(3, 1) for x in (one.tokens, one.labels, one.positions)))
    counts = meter.Counts(9, 2, Full(), 4)
    assert meter.batch_flops(counts, three) == 3 * meter.batch_flops(counts, one)


def test_peaks():
    cpu = torch.device("cpu")
    assert meter.peak_flops(cpu) > 1e8
    assert meter.peak_flops(cpu) == meter.peak_flops(cpu)  # measured once
    assert meter.peak_memory(cpu) > 10 << 20


def test_flops_of_contexts():
    decoder = Net(tied=True)
    decoder.config = SimpleNamespace(num_attention_heads=1, num_hidden_layers=3, hidden_size=4)
    decoder.encoder = nn.Sequential(nn.Embedding(11, 5), nn.Linear(5, 5))
    decoder.encoder.config = SimpleNamespace(
        num_attention_heads=1, num_hidden_layers=2, hidden_size=5
    )
    cross = nn.ModuleDict({n: nn.Linear(4, 4, bias=False) for n in ("q_proj", "o_proj")})
    cross.update({n: nn.Linear(5, 4, bias=False) for n in ("k_proj", "v_proj")})
    layer = SimpleNamespace(cross_attn=SimpleNamespace(**dict(cross.items())))
    decoder.cross, decoder.cross_attending = cross, lambda: [layer]
    own = 4 * 6 + 4 * 10
    assert meter.counts(decoder) == meter.Counts(own + 32, 4, Full(), 3, 25 + 40, 10, 4)
    for part in (decoder.up, decoder.head):
        part.requires_grad_(False)
    found = meter.counts(decoder)
    assert found.weights == pytest.approx(own * 2 / 3 + 32)

    positions = torch.arange(6).repeat(2, 1)
    plain = Batch(positions, positions, positions)
    alone = 6 * found.weights * 12 + 12 * 12 * 2 * 6 * 7 / 2
    assert meter.batch_flops(found, plain) == pytest.approx(alone, rel=1e-14)
    full = Batch(positions, positions, positions, torch.zeros(2, 3, 7, dtype=torch.int64))
    # three passes of two products of 2 multiply-adds a pair: 7 x 7 in a context, 6 x 21 across
    attention = 3 * 2 * 2 * (2 * 3 * 7 * 7 * 10 + 2 * 6 * 21 * 4)
    expected = alone + 6 * 65 * 2 * 21 + attention
    assert meter.batch_flops(found, full) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_flops_count_the_pairs_of_the_definition(name):
    """Of every method, in every layer, over documents and heads."""
    model = network(attention=first(name), num_hidden_layers=LAYERS)
    config = model.config
    method, heads, pairs = recorded(config), config.num_attention_heads, 0
    for n in (40, 23):
        for layer in range(LAYERS):
            pairs += int(live_pairs(method, n, layer, heads).sum())
    linear = 6 * meter.matmul_weights(model) * 63
    found = meter.batch_flops(meter.counts(model), rows(40, 23))
    assert found == pytest.approx(linear + 12 * pairs * config.head_dim, rel=1e-12)


def test_a_window_is_not_counted_as_full_attention():
    """128K tokens of a model with a window of 4K: attention costs a seventeenth of the square."""
    tokens = 1 << 17
    for name in ("streaming", "lm_infinite"):
        method = attention_method(name).for_window(4096)
        share = method.pairs(torch.arange(tokens), 2) / Full().pairs(torch.arange(tokens), 2)
        assert share == pytest.approx(2 * 4096 / tokens, rel=0.02)
