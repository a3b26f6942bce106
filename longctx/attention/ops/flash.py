"""Torch's flash kernels with the log-sum-exp that a merge needs, forward and backward.

CPU and CUDA have one each; where CUDA has none for a type, dense fp32 scores of the part stand in.
"""

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    """(output `[b hq m d]`, log-sum-exp `[b hq m]`) of one part, on the device's flash kernel."""
    aten = torch.ops.aten
    if not q.is_cuda:
        o, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, scale=scaling
        )
        return o, lse
    if q.dtype in HALF and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256:
        found = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scaling)
        return found[0], found[1][:, :, : q.shape[2]]
    return dense(q, k, v, causal, scaling)


def flash_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    o: Tensor,
    lse: Tensor,
    causal: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one part, given the merged output and log-sum-exp."""
    aten = torch.ops.aten
    if not q.is_cuda:
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, o, lse.contiguous(), 0.0, causal, scale=scaling
        )
    elif q.dtype in HALF and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256:
        none = torch.empty(0, dtype=torch.int64, device=q.device)
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is not
        found = aten._scaled_dot_product_flash_attention_backward(
            grad.contiguous(), q, k, v, o.contiguous(), lse.contiguous(), none, none,
            q.shape[2], k.shape[2], 0.0, causal, seed, none, scale=scaling,
        )  # fmt: skip
    else:
        found = dense_backward(q, k, v, grad, o, lse, causal, scaling)
    return found[0], found[1], found[2]


def _scores(q: Tensor, k: Tensor, causal: bool, scaling: float) -> Tensor:
    """`[b hk g m n]` in fp32: what is left where a device has no flash kernel for a type."""
    b, heads, m, d = q.shape
    grouped = q.reshape(b, k.shape[1], heads // k.shape[1], m, d).float()
    scores = grouped @ k.float().mT[:, :, None] * scaling
    if causal:
        live = torch.ones(m, k.shape[2], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~live, -torch.inf)
    return scores


def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    """What `flash` gives, from scores that all exist at once."""
    scores = _scores(q, k, causal, scaling)
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp() @ v.float()[:, :, None]
    return out.reshape(q.shape).to(q.dtype), lse.reshape(q.shape[:3])


def dense_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    o: Tensor,
    lse: Tensor,
    causal: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `flash_backward` gives, from scores that all exist at once."""
    scores = _scores(q, k, causal, scaling)
    shape = (*scores.shape[:3], q.shape[2])
    weights = (scores - lse.reshape(shape)[..., None]).exp()
    g = grad.reshape(*shape, -1).float()
    inner = (g * o.reshape(*shape, -1).float()).sum(-1, keepdim=True)
    d_scores = weights * (g @ v.float().mT[:, :, None] - inner) * scaling
    d_q = (d_scores @ k.float()[:, :, None]).reshape(q.shape)
    d_k = (d_scores.mT @ q.reshape(*shape, -1).float()).sum(2)
    d_v = (weights.mT @ g).sum(2)
    return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype)
