import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from longctx.batch import IGNORE
from longctx.config.distill import MODES, KlConfig, TeacherConfig
from longctx.errors import UserError
from longctx.train.distill import TopK, chunked_distillation, divergence, kept

B, S, H, V, K = 2, 37, 8, 50, 5
T = 1.7


def inputs(scored: float = 0.7, dtype: torch.dtype = torch.float64):
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(B, S, H, generator=draw, dtype=dtype) for _ in range(2))
    head = nn.Linear(H, V, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(V, H, generator=draw, dtype=dtype))
    labels = torch.randint(0, V, (B, S), generator=draw)
    labels[torch.rand(B, S, generator=draw) >= scored] = IGNORE
    return student.requires_grad_(), teacher, head, labels


def kl_of(mode: str, temperature: float = T, **more: float) -> KlConfig:
    return KlConfig(mode, K, temperature, **{"weight": 2.0, "lm_weight": 1.0, **more})


def naive(student, teacher, head, labels, kl):
    """The same loss as one would write it down, differentiated by autograd."""
    here = labels != IGNORE
    logits = head(student[here])
    ce = torch.nn.functional.cross_entropy(logits, labels[here], reduction="sum")
    q = torch.softmax(logits / kl.temperature, -1)
    with torch.no_grad():
        p = torch.softmax(head(teacher[here]) / kl.temperature, -1)
    if kl.mode != "full":
        top, ids = p.topk(kl.top_k, dim=-1)
        p, q = top, q.gather(-1, ids)
        if kl.mode == "topk_rest":
            p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    apart = (p * (p.log() - q.log())).sum()
    return kl.lm_weight * ce + kl.weight * kl.temperature**2 * apart


def close(found, right, dtype):
    tight = 1e-6 if dtype == torch.float32 else 1e-12
    # The largest entry sets the scale: entries near zero are differences of larger numbers.
    size = right.abs().max()
    torch.testing.assert_close(found / size, right / size, rtol=tight, atol=tight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, T])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk", [1, 7, None])
def test_chunks_give_the_plain_loss_and_gradients(mode, temperature, chunk, dtype):
    student, teacher, head, labels = inputs(dtype=dtype)
    kl = kl_of(mode, temperature)
    want = naive(student, teacher, head, labels, kl)
    wanted = torch.autograd.grad(want, (student, head.weight))
    got, count = chunked_distillation(student, teacher, head, labels, kl, chunk)
    assert int(count) == int((labels != IGNORE).sum())
    close(got, want, dtype)
    for found, right in zip(torch.autograd.grad(got, (student, head.weight)), wanted, strict=True):
        close(found, right, dtype)


@pytest.mark.parametrize("mode", MODES)
def test_finite_differences(mode):
    student, teacher, head, labels = inputs()
    student, teacher, labels = student.detach()[:1, :5], teacher[:1, :5], labels[:1, :5]
    head.requires_grad_(False)

    def loss(x):
        return chunked_distillation(x, teacher, head, labels, kl_of(mode), 2)[0]

    assert torch.autograd.gradcheck(loss, (student.requires_grad_(),), atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_student_like_teacher_is_zero_and_has_no_slope(mode):
    student, _, head, labels = inputs()
    kl = kl_of(mode, lm_weight=0.0)
    total, _ = chunked_distillation(student, student.detach().clone(), head, labels, kl, 7)
    assert abs(total.item()) < 1e-12
    total.backward()
    # Dropping the rest, equality is no minimum: raising the kept tokens would lower it further.
    flat = student.grad.abs().max() < 1e-12
    assert flat == (mode != "topk_drop")


def apart(mode, student, teacher):
    return divergence(student, (teacher,), kl_of(mode, temperature=1.0))[0]


def test_only_the_dropping_form_falls_below_zero():
    draw = torch.Generator().manual_seed(1)
    size = (4000, 20)
    teacher = torch.randn(size, generator=draw, dtype=torch.float64)
    student = teacher + 0.3 * torch.randn(size, generator=draw, dtype=torch.float64)
    lowest = {mode: apart(mode, student, teacher).min().item() for mode in MODES}
    assert lowest["full"] > 0 and lowest["topk_rest"] > 0
    assert lowest["topk_drop"] < -0.05


def test_keeping_more_comes_nearer_to_the_whole():
    draw = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(300, V, generator=draw, dtype=torch.float64) for _ in range(2))
    whole = apart("full", student, teacher)
    found = [
        divergence(student, (teacher,), KlConfig("topk_rest", k))[0] for k in (1, 5, 20, V - 1)
    ]
    for fewer, more in zip(found, [*found[1:], whole], strict=True):
        assert (fewer <= more + 1e-12).all()  # merging outcomes can only lose
    torch.testing.assert_close(found[-1], whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_no_gradient_reaches_the_teacher(mode):
    student, teacher, head, labels = inputs()
    teacher.requires_grad_()
    total, _ = chunked_distillation(student, teacher, head, labels, kl_of(mode), 7)
    total.backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def test_a_frozen_head_stays_without_gradient():
    student, teacher, head, labels = inputs()
    want = torch.autograd.grad(
        chunked_distillation(student, teacher, head, labels, kl_of("full"), 7)[0], student
    )
    head.requires_grad_(False)
    total, _ = chunked_distillation(student, teacher, head, labels, kl_of("full"), 7)
    total.backward()
    assert head.weight.grad is None
    assert torch.equal(student.grad, want[0])


@pytest.mark.parametrize("mode", MODES)
def test_labels_that_are_not_scored_change_nothing(mode):
    student, teacher, head, labels = inputs()
    total, _ = chunked_distillation(student, teacher, head, labels, kl_of(mode), 7)
    there = labels == IGNORE
    moved, other = student.detach().clone(), teacher.clone()
    moved[there], other[there] = 9.0, -9.0
    again, _ = chunked_distillation(moved, other, head, labels, kl_of(mode), 7)
    assert again.item() == total.item()


@pytest.mark.parametrize("chunk", [7, None])
@pytest.mark.parametrize("mode", MODES)
def test_no_scored_position_is_zero_and_keeps_its_graph(mode, chunk):
    student, teacher, head, labels = inputs(scored=0.0)
    total, count = chunked_distillation(student, teacher, head, labels, kl_of(mode), chunk)
    assert total.item() == 0 and int(count) == 0
    total.backward()
    assert not student.grad.any() and not head.weight.grad.any()


def stored(teacher, head, temperature, dtype=None):
    ids, p, rest = kept(head(teacher).flatten(0, 1), K, temperature)
    p = torch.cat([p, rest], -1).detach()
    return TopK(ids.view(B, S, K), (p if dtype is None else p.to(dtype)).view(B, S, K + 1))


@pytest.mark.parametrize("mode", ["topk_rest", "topk_drop"])
def test_a_stored_teacher_is_the_one_on_line(mode):
    student, teacher, head, labels = inputs()
    kl = kl_of(mode)
    wanted, _ = chunked_distillation(student, teacher, head, labels, kl, 7)
    right = torch.autograd.grad(wanted, student)[0]
    for dtype, tolerance in ((None, 1e-12), (torch.float16, 2**-10)):
        kept_of_it = stored(teacher, head, T, dtype)
        got, _ = chunked_distillation(student, kept_of_it, head, labels, kl, 7)
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
        found = torch.autograd.grad(got, student)[0]
        assert (found - right).abs().max() <= tolerance * right.abs().max()


def test_a_stored_probability_of_zero_is_allowed():
    ids, p = torch.tensor([[0, 1]]), torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float16)
    for mode in ("topk_rest", "topk_drop"):
        value, slope = divergence(torch.randn(1, 6), (ids, p), KlConfig(mode, 2))
        assert value.isfinite().all() and slope.isfinite().all()


def test_bf16_is_summed_in_fp32():
    student, teacher, head, labels = inputs(dtype=torch.bfloat16)
    student = student.detach().requires_grad_()
    total, _ = chunked_distillation(student, teacher, head, labels, kl_of("full"), 7)
    total.backward()
    assert total.dtype == torch.float32 and student.grad.dtype == torch.bfloat16


def test_the_head_is_called_equally_often_on_every_rank():
    """ZeRO-3 gathers its weight in each call, and every rank must take part."""
    calls = []
    for scored in (1.0, 0.5, 0.0):
        student, teacher, head, labels = inputs(scored)
        calls.append(0)
        head.register_forward_hook(lambda *_: calls.append(calls.pop() + 1))
        chunked_distillation(student, teacher, head, labels, kl_of("full"), 7)[0].backward()
    pieces = -(-B * S // 7)
    assert calls == [4 * pieces] * 3  # student and teacher, forward and again backward


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


@pytest.mark.parametrize("mode", MODES)
def test_no_tensor_grows_with_sequence_times_vocabulary(mode):
    s, v, chunk = 512, 1000, 16
    student = torch.randn(1, s, H, requires_grad=True)
    teacher, head, labels = torch.randn(1, s, H), nn.Linear(H, v, bias=False), torch.arange(s)[None]
    with Largest() as largest:
        chunked_distillation(student, teacher, head, labels, kl_of(mode), chunk)[0].backward()
    assert largest.numel == chunk * v < s * v / 10
    with Largest() as largest:
        naive(student, teacher, head, labels, kl_of(mode)).backward()
    assert largest.numel == s * v  # the instrument sees it


def test_what_does_not_fit_is_said():
    student, teacher, head, labels = inputs()
    known = stored(teacher, head, T)
    for teacher_given, kl, message in (
        (known, kl_of("full"), "teacher.source=online"),
        (teacher, KlConfig("topk_rest", V), "below the vocabulary's 50"),
        (known, KlConfig("topk_rest", K + 1), "kl.top_k=6, but 5"),
    ):
        with pytest.raises(UserError, match=message):
            chunked_distillation(student, teacher_given, head, labels, kl)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "reverse"}, "kl.mode='reverse' is not one of full, topk_rest, topk_drop"),
        ({"temperature": 0.0}, "kl.temperature=0.0 must be above 0"),
        ({"weight": -1.0}, "kl.weight=-1.0 must not be below 0"),
        ({"weight": 0.0, "lm_weight": 0.0}, "kl.weight \\+ kl.lm_weight=0.0 must be above 0"),
    ],
)
def test_settings_that_make_no_sense(values, message):
    with pytest.raises(UserError, match=message):
        KlConfig(**values)


def test_a_stored_teacher_needs_its_directory():
    with pytest.raises(UserError, match=r"teacher.source=stored needs teacher.store=DIR"):
        TeacherConfig("stored")
