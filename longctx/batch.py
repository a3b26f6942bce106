"""The batch contract, and the letters that every docstring uses.

`b` rows, `s` sequence, `t = s/sp` local sequence, `hq hk` query and key heads, `d` head size,
`v` vocabulary, `c` contexts (encoder chunks), `l` tokens per context. The unit is tokens unless
a docstring says otherwise.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

IGNORE = -100  # a label that is not scored


@dataclass(frozen=True)
class Batch:
    """What a recipe's loss sees. Labels are already shifted: `labels[:, i]` follows `tokens[:, i]`.

    Args:
        tokens: `[b s]` int64.
        labels: `[b s]` int64, `IGNORE` where nothing is scored.
        positions: `[b s]` int64. They restart at 0 where a document starts; that restart is the
            only boundary mark, and it drives the attention mask.
        contexts: `[b c l]` int64, tokens for an encoder; None for plain decoders.
        context_mask: `[b c l]` bool, True on tokens that the encoder sees; None: all.
        teacher_ids: `[b s k]` int64, the most probable next tokens of a stored teacher; None: none.
        teacher_probabilities: `[b s k+1]` of those, and of all other tokens together.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    contexts: Tensor | None = None
    context_mask: Tensor | None = None
    teacher_ids: Tensor | None = None
    teacher_probabilities: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are present, by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in named.items() if value is not None}

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return Batch(**{k: v.to(device, non_blocking=True) for k, v in self.tensors().items()})

    @property
    def scored(self) -> int:
        """How many labels are scored."""
        return int((self.labels != IGNORE).sum())
