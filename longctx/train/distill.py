"""Cross entropy plus a divergence from a teacher's distribution, without either model's logits.

As in `longctx/train/loss.py` both heads run on a few positions at a time and again in the backward
pass, so memory is bounded instead of `s x v`, for two more head forwards. One pass over a piece
gives both losses and their whole gradient with respect to the student's logits.
Source: CEPE (2402.16617) section 5, which keeps the teacher's 50 most probable tokens; the factor
of the temperature is that of Hinton et al. (1503.02531).
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from longctx.batch import IGNORE, Batch
from longctx.config.distill import KlConfig
from longctx.errors import UserError
from longctx.train.loss import LOGITS_BYTES


@dataclass(frozen=True)
class TopK:
    """The kept part of a teacher's distribution.

    Args:
        ids: `[b s k]` int64, the k most probable tokens.
        probabilities: `[b s k+1]` of those, and of all others together, at `kl.temperature`.
    """

    ids: Tensor
    probabilities: Tensor


def teacher_states(model: Any, batch: Batch) -> Tensor:
    """The last states `[b s h]` of the decoder alone over [context ; input], without gradients.

    The same weights as the student's: no contexts are given, so cross-attention is left out. One
    more forward of the decoder, over contexts and input together.

    Args:
        model: with `get_decoder()` and `row_ranks`.
        batch: with `contexts`; its rows are one stream each.
    """
    assert batch.contexts is not None and batch.context_mask is None
    before, ranks = batch.contexts.flatten(1), model.row_ranks
    row = batch.tokens if ranks is None else ranks.whole(batch.tokens)
    tokens = torch.cat([before, row], dim=1)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    if ranks is not None:
        tokens, positions = (_own_part(x, ranks) for x in (tokens, positions))
    decoder = model.get_decoder()
    training = decoder.training
    decoder.eval()  # a teacher drops nothing
    with torch.no_grad():
        out = decoder(input_ids=tokens, position_ids=positions, use_cache=False)
    decoder.train(training)
    states: Tensor = out.last_hidden_state
    if ranks is None:
        return states[:, before.shape[1] :]
    moved: Tensor = ranks.moved(states, before.shape[1], batch.tokens.shape[1])
    return moved


def _own_part(x: Tensor, ranks: Any) -> Tensor:
    """Each rank's equal part of whole rows `[b n]`, padded with zeros at the end.

    The padding comes after all tokens, and position 0 makes it documents of its own.
    """
    each = -(-x.shape[1] // ranks.size)
    padded = torch.nn.functional.pad(x, (0, each * ranks.size - x.shape[1]))
    return padded[:, ranks.rank * each : ranks.rank * each + each].contiguous()


def decoder_digest(model: Any) -> str:
    """SHA-256 of the decoder's weights as they are held, without what CEPE added; some GB/s.

    Args:
        model: with `added_parameters()`; taken before an engine may shard it.
    """
    added, digest = model.added_parameters(True), hashlib.sha256()
    for name, parameter in model.named_parameters():
        if name not in added:
            digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
            raw = parameter.detach().cpu().contiguous().view(torch.uint8)
            digest.update(raw.reshape(-1).numpy().data)
    return digest.hexdigest()


def teacher_of(model: Any, batch: Batch) -> Tensor | TopK:
    """The stored teacher where the batch has one, else the states of the one on line."""
    if batch.teacher_ids is None or batch.teacher_probabilities is None:
        return teacher_states(model, batch)
    return TopK(batch.teacher_ids, batch.teacher_probabilities)


def chunked_distillation(
    hidden: Tensor,
    teacher: Tensor | TopK,
    head: nn.Linear,
    labels: Tensor,
    kl: KlConfig,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed `lm_weight x CE + weight x T^2 x KL(teacher || student)`, and how many labels count.

    Both distributions are at temperature T in the divergence; T^2 keeps its gradient in proportion
    to that of the cross entropy, which stays at 1. Only scored positions reach the head; fp32.

    Args:
        hidden: `[b s h]` the student's last hidden states.
        teacher: `[b s h]` the teacher's at the same positions, or what is stored of it; no gradient
            reaches it.
        head: `[n h] -> [n v]` logits of both.
        labels: `[b s]`, already shifted, `IGNORE` = not scored, by neither loss.
        kl: weights, temperature and form of the divergence; see `divergence`.
        chunk: positions whose logits exist at once; None: as many as `LOGITS_BYTES` hold, twice.

    Returns:
        (sum, count), both scalars; the sum is differentiable, also where count is 0.

    Raises:
        UserError: if `kl` wants what the teacher cannot give.
    """
    _check(teacher, head.out_features, kl)
    scored = labels != IGNORE
    whole = [teacher.ids, teacher.probabilities] if isinstance(teacher, TopK) else [teacher]
    given = [hidden[scored], labels[scored], *(part.detach()[scored] for part in whole)]

    def part(x: Tensor, y: Tensor, *known: Tensor) -> Tensor:
        if len(known) == 1:
            with torch.no_grad():
                known = (head(known[0]),)
        total: Tensor = _Fused.apply(head(x), y, kl, *known)  # type: ignore[no-untyped-call]
        return total

    if chunk is None:
        chunk = max(1, LOGITS_BYTES // (2 * 4 * head.out_features))
    # As many pieces on every rank, as in `chunked_cross_entropy`: ZeRO-3 gathers in each call.
    count = -(-labels.numel() // chunk)
    if count == 1:
        return part(*given), scored.sum()
    pieces = zip(*(whole.tensor_split(count) for whole in given), strict=True)
    total = torch.stack([checkpoint(part, *piece, use_reentrant=False) for piece in pieces]).sum()
    return total, scored.sum()


def _check(teacher: Tensor | TopK, vocabulary: int, kl: KlConfig) -> None:
    if kl.mode == "full":
        if isinstance(teacher, TopK):
            raise UserError(
                "kl.mode=full needs teacher.source=online: stored are only the most probable tokens"
            )
        return
    if kl.top_k >= vocabulary:
        raise UserError(f"kl.top_k={kl.top_k} must be below the vocabulary's {vocabulary}")
    if isinstance(teacher, TopK) and teacher.ids.shape[-1] != kl.top_k:
        raise UserError(f"kl.top_k={kl.top_k}, but {teacher.ids.shape[-1]} a position are stored")


class _Fused(torch.autograd.Function):
    """Both losses of `[n v]` logits as one number, and its gradient in the same pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, kl: KlConfig, *known: Tensor) -> Tensor:
        """The weighted sum; `known` is the teacher's `[n v]` logits, or its kept ids and values."""
        exact = torch.promote_types(logits.dtype, torch.float32)
        scores = logits.to(exact)
        target = labels[:, None]
        log_sum = scores.logsumexp(-1, keepdim=True)
        total = kl.lm_weight * (log_sum - scores.gather(-1, target)).sum()
        tempered = scores if kl.temperature == 1 else scores / kl.temperature
        apart, slope = divergence(tempered, known, kl)
        total = total + kl.weight * kl.temperature**2 * apart.sum()
        if ctx.needs_input_grad[0]:
            slope *= kl.weight * kl.temperature
            slope += (scores - log_sum).exp_().mul_(kl.lm_weight)
            slope.scatter_add_(-1, target, torch.full_like(log_sum, -kl.lm_weight))
            ctx.save_for_backward(slope.to(logits.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        """The kept gradient, times the scale that came afterwards; none for the teacher."""
        (slope,) = ctx.saved_tensors
        return slope * scale, None, None, *(None for _ in ctx.needs_input_grad[3:])


def divergence(scores: Tensor, known: tuple[Tensor, ...], kl: KlConfig) -> tuple[Tensor, Tensor]:
    """`D(teacher || student)` at each position, and its gradient with respect to `scores`.

    `full`: sum of p log(p / q) over the vocabulary; gradient q - p.
    `topk_rest`: over the teacher's k most probable tokens and the rest as one more, whose log
    probability is a log-sum-exp; like any divergence never negative.
    `topk_drop`: over the k alone, as CEPE's code has it. Their probabilities do not add up to 1, so
    it can fall below zero and is least where q is proportional to them.

    Args:
        scores: `[n v]` the student's logits over the temperature.
        known: the teacher's `[n v]` logits, or its `[n k]` ids and `[n k+1]` probabilities.
        kl: form, k and temperature.

    Returns:
        `[n]`, and `[n v]`.
    """
    if kl.mode == "full":
        return _full(scores, known[0], kl.temperature)
    given = kept(known[0], kl.top_k, kl.temperature) if len(known) == 1 else _stored(*known)
    ids, p, rest = given
    p, rest = p.to(scores.dtype), rest.to(scores.dtype)
    log_sum = scores.logsumexp(-1, keepdim=True)
    log_q = scores.gather(-1, ids) - log_sum
    apart = (torch.special.xlogy(p, p) - p * log_q).sum(-1)
    slope = (scores - log_sum).exp_()
    if kl.mode == "topk_drop":
        slope *= p.sum(-1, keepdim=True)
    else:
        others = scores.scatter(-1, ids, -torch.inf)
        log_rest = others.logsumexp(-1, keepdim=True)
        apart += (torch.special.xlogy(rest, rest) - rest * (log_rest - log_sum)).squeeze(-1)
        slope -= (others - log_rest).exp_().mul_(rest)
    return apart, slope.scatter_add_(-1, ids, -p)


def _full(scores: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = teacher.to(scores.dtype, copy=True).div_(temperature)
    log_p -= log_p.logsumexp(-1, keepdim=True)
    log_q = scores - scores.logsumexp(-1, keepdim=True)
    p = log_p.exp()
    apart = log_p.sub_(log_q).mul_(p).sum(-1)
    return apart, log_q.exp_().sub_(p)


def kept(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The k most probable tokens of each position.

    Args:
        logits: `[n v]`.
        k: below v.
        temperature: of the probabilities.

    Returns:
        Their `[n k]` ids and probabilities, and the `[n 1]` probability of all others together.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    scores = logits.to(exact, copy=True).div_(temperature)
    log_sum = scores.logsumexp(-1, keepdim=True)
    top, ids = scores.topk(k, dim=-1)
    rest = scores.scatter_(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return ids, (top - log_sum).exp_(), (rest - log_sum).exp_()


def _stored(ids: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `kept` gave, rounded by storing it and so brought back to a sum of 1."""
    p = probabilities.to(torch.promote_types(probabilities.dtype, torch.float32))
    p = p / p.sum(-1, keepdim=True)
    return ids, p[:, :-1], p[:, -1:]
