from types import SimpleNamespace

import pytest
import torch
from torch import nn

from longctx.batch import Batch
from longctx.models.choose import attention_method
from longctx.train import meter
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


def test_flops_of_two_documents_in_a_row():
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    # causal, forward and twice that backward: QK^T and PV are 2 n^2 multiply-adds a width, halved
    attention = sum(3 * 2 * 2 * n * n * 7 / 2 for n in (3, 2))
    assert meter.step_flops(100, 7, positions) == 3 * 2 * 100 * 5 + attention


def test_flops_of_a_batch_are_the_sum_of_its_rows():
    rows = torch.arange(6).repeat(3, 1)
    assert meter.step_flops(9, 2, rows) == 3 * meter.step_flops(9, 2, rows[:1])


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
    assert meter.counts(decoder) == meter.Counts(own + 32, 12, 25 + 40, 10, 4)
    for part in (decoder.up, decoder.head):
        part.requires_grad_(False)
    found = meter.counts(decoder)
    assert found.weights == pytest.approx(own * 2 / 3 + 32)

    positions = torch.arange(6).repeat(2, 1)
    plain = Batch(positions, positions, positions)
    alone = meter.step_flops(found.weights, 12, positions)
    assert meter.batch_flops(found, plain) == alone
    full = Batch(positions, positions, positions, torch.zeros(2, 3, 7, dtype=torch.int64))
    # three passes of two products of 2 multiply-adds a pair: 7 x 7 in a context, 6 x 21 across
    attention = 3 * 2 * 2 * (2 * 3 * 7 * 7 * 10 + 2 * 6 * 21 * 4)
    assert meter.batch_flops(found, full) == alone + 6 * 65 * 2 * 21 + attention


@pytest.mark.parametrize(
    "attention",
    [
        {"name": "longgen_window", "sink_tokens": 2, "window_tokens": 5, "full_layers": [1]},
        {"name": "longgen_blocks", "block_size": 3, "local_blocks": 2, "stride": 4,
         "full_layers": [1]},
    ],
)  # fmt: skip
def test_flops_of_layers_that_forget(attention):
    """Pairs of sparse layers are those of the definition, over documents and heads."""
    model = network(attention=attention)
    config, method = model.config, attention_method(model.config.longctx_attention)
    heads = config.num_attention_heads
    pairs = 0
    for n in (40, 23):
        i, j = torch.arange(n)[None, :, None], torch.arange(n)[None, None]
        for layer in range(config.num_hidden_layers):
            if not method.evicts(layer):
                pairs += heads * n * n / 2  # as in other models: half of the square
                continue
            live, _ = method.definition(i, j, layer, torch.arange(heads)[:, None, None])
            pairs += int(live.expand(heads, n, n).sum())
    positions = torch.cat([torch.arange(40), torch.arange(23)])[None]
    batch = Batch(tokens=positions, labels=positions, positions=positions)
    linear = 6 * meter.matmul_weights(model) * 63
    found = meter.batch_flops(meter.counts(model), batch)
    assert found == pytest.approx(linear + 12 * pairs * config.head_dim, rel=1e-12)
