"""Cross entropy over a large vocabulary without the logits.

The head and the loss run on a few thousand tokens at a time and are recomputed in the backward
pass, so memory is bounded instead of `s x v`, at the price of one more head forward. A plain
checkpoint is used on purpose: DeepSpeed's fused tiled loss gives a wrong head gradient as soon as
its result is scaled.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from longctx.batch import IGNORE

LOGITS_BYTES = 256 << 20  # fp32 logits that exist at once


def chunked_cross_entropy(
    hidden: Tensor, head: nn.Linear, labels: Tensor, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Summed cross entropy, and how many labels were scored.

    Only scored positions reach the head; softmax in fp32.

    Args:
        hidden: `[b s h]` last hidden states.
        head: `[n h] -> [n v]` logits.
        labels: `[b s]`, already shifted, `IGNORE` = not scored.
        chunk: tokens whose logits exist at once; None: as many as `LOGITS_BYTES` hold.

    Returns:
        (sum, count), both scalars; the sum is fp32 and differentiable, also where count is 0.
    """
    scored = labels != IGNORE
    states, targets = hidden[scored], labels[scored]

    def part(x: Tensor, y: Tensor) -> Tensor:
        logits = head(x)
        return cross_entropy(logits.float(), y, reduction="sum")

    if chunk is None:
        chunk = max(1, LOGITS_BYTES // (4 * head.out_features))
    # The number of pieces follows from the shape alone, also where few labels are scored or none:
    # under ZeRO-3 every rank must call the head equally often, and the sum must keep its graph.
    count = -(-labels.numel() // chunk)
    if count == 1:  # nothing to save by computing it twice
        return part(states, targets), scored.sum()
    pieces = zip(states.tensor_split(count), targets.tensor_split(count), strict=True)
    total = torch.stack([checkpoint(part, x, y, use_reentrant=False) for x, y in pieces]).sum()
    return total, scored.sum()
