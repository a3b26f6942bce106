import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from longctx.batch import IGNORE
from longctx.train.loss import chunked_cross_entropy

B, S, H, V = 2, 37, 8, 50


def inputs(scored: float = 0.7, dtype: torch.dtype = torch.float64):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, S, H, generator=draw, dtype=dtype).requires_grad_()
    head = nn.Linear(H, V, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(V, H, generator=draw, dtype=dtype))
    labels = torch.randint(0, V, (B, S), generator=draw)
    labels[torch.rand(B, S, generator=draw) >= scored] = IGNORE
    return hidden, head, labels


def plain(hidden, head, labels):
    logits = head(hidden).float().flatten(0, 1)
    return cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 7, B * S, None])
def test_chunks_give_the_plain_loss_and_gradients(chunk):
    hidden, head, labels = inputs()
    want = plain(hidden, head, labels)
    wanted = torch.autograd.grad(want, (hidden, head.weight))
    got, count = chunked_cross_entropy(hidden, head, labels, chunk)
    assert got.dtype == torch.float32 and int(count) == int((labels != IGNORE).sum())
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    for found, right in zip(torch.autograd.grad(got, (hidden, head.weight)), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-7)


def test_gradients_follow_a_scale_that_comes_afterwards():
    hidden, head, labels = inputs()
    wanted = torch.autograd.grad(plain(hidden, head, labels) * 0.37, (hidden, head.weight))
    total, _ = chunked_cross_entropy(hidden, head, labels, 7)
    (total * 0.37).backward()
    for found, right in zip((hidden.grad, head.weight.grad), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-7)


def test_a_tied_head_gets_both_gradients():
    _, head, labels = inputs()
    tokens = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(1))
    grads = []
    for loss in (lambda x: plain(x, head, labels), lambda x: parts(x, head, labels)):
        head.weight.grad = None
        loss(torch.tanh(head.weight[tokens])).backward()
        grads.append(head.weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-7)


def parts(hidden, head, labels):
    return chunked_cross_entropy(hidden, head, labels, 7)[0]


@pytest.mark.parametrize("chunk", [7, None])
def test_no_scored_token_is_zero_and_keeps_its_graph(chunk):
    hidden, head, labels = inputs(scored=0.0)
    total, count = chunked_cross_entropy(hidden, head, labels, chunk)
    assert total.item() == 0 and int(count) == 0
    total.backward()
    assert not hidden.grad.any() and not head.weight.grad.any()


def test_the_head_is_called_equally_often_on_every_rank():
    """ZeRO-3 gathers its weight in each call, and every rank must take part."""
    calls = []
    for scored in (1.0, 0.5, 0.0):
        hidden, head, labels = inputs(scored)
        calls.append(0)
        head.register_forward_hook(lambda *_: calls.append(calls.pop() + 1))
        chunked_cross_entropy(hidden, head, labels, 7)[0].backward()
    assert calls[0] == calls[1] == calls[2] == 2 * -(-B * S // 7)  # forward, and again backward


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else [result]:
            if isinstance(item, torch.Tensor):
                self.numel = max(self.numel, item.numel())
        return result


def test_no_tensor_grows_with_sequence_times_vocabulary():
    s, v, chunk = 512, 1000, 16
    hidden = torch.randn(1, s, H, requires_grad=True)
    head, labels = nn.Linear(H, v, bias=False), torch.arange(s)[None]
    with Largest() as largest:
        chunked_cross_entropy(hidden, head, labels, chunk)[0].backward()
    assert largest.numel == chunk * v < s * v / 10
    with Largest() as largest:
        plain(hidden, head, labels).backward()
    assert largest.numel == s * v  # the instrument sees it
