"""What is hidden from an encoder: tokens that it has to guess, or parts of its contexts.

Each is a function of (seed, sample), the sample's number in the one global order of rows. So masks
are the same for every number of ranks and after a resume, and differ in every epoch. Costs making a
random generator per row, some 20 microseconds.
Source: CEPE (2402.16617) and its loader's options.
"""

from dataclasses import dataclass

import numpy as np

from longctx.batch import IGNORE
from longctx.data.corpus import Row

# Keys of the two random streams; no loader's source has such a number.
TOKENS, CONTEXTS = 0x6D6C6D, 0x637478


@dataclass(frozen=True)
class MaskTokens:
    """Rows for a masked language model: hidden tokens become `[MASK]`, and only they are scored.

    Args:
        rate: probability that a token is hidden.
        mask_id: what stands in its place.
        special: ids that are never hidden.
        seed: of the choice.
    """

    rate: float
    mask_id: int
    special: tuple[int, ...]
    seed: int

    def __call__(self, row: Row, sample: int) -> Row:
        """The row with its tokens `[s]` masked; labels are the hidden tokens, not shifted."""
        tokens = row["tokens"]
        draw = _random(self.seed, sample, TOKENS).random(len(tokens))
        hidden = (draw < self.rate) & ~np.isin(tokens, self.special)
        return {
            **row,
            "tokens": np.where(hidden, self.mask_id, tokens),
            "labels": np.where(hidden, tokens, IGNORE),
        }


@dataclass(frozen=True)
class MaskContexts:
    """Hides parts of contexts from the encoder, so that the decoder learns to do without.

    Args:
        rate: probability that a context is masked.
        whole: of masked contexts, the share that is masked in full; the others lose their last
            1 to l - 1 tokens, each number as likely.
        seed: of the choice.
    """

    rate: float
    whole: float
    seed: int

    def __call__(self, row: Row, sample: int) -> Row:
        """The row with a `context_mask [c l]`, True on tokens that the encoder sees."""
        count, size = row["contexts"].shape
        random = _random(self.seed, sample, CONTEXTS)
        masked, whole = random.random(count) < self.rate, random.random(count) < self.whole
        lost = random.integers(1, max(size, 2), count)
        kept = np.where(masked, np.where(whole, 0, size - lost), size)
        return {**row, "context_mask": np.arange(size) < kept[:, None]}


def _random(seed: int, sample: int, purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox([seed, sample, purpose]))
