"""What is hidden: how much, of which tokens, and that it depends on seed and sample alone."""

import numpy as np
import pytest

from longctx.batch import IGNORE
from longctx.data.masks import MaskContexts, MaskTokens

SPECIAL = (0, 1, 2)
MASK_ID = 64


def tokens_row(seed: int, size: int = 512) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(seed).integers(0, MASK_ID, size)
    return {"tokens": tokens, "labels": np.roll(tokens, -1), "positions": np.arange(size)}


def test_hidden_tokens_alone_are_scored():
    before = tokens_row(0)
    after = MaskTokens(0.3, MASK_ID, SPECIAL, seed=0)(before, 7)
    hidden = after["tokens"] == MASK_ID
    assert 0 < hidden.sum() < 512
    assert np.array_equal(after["tokens"][~hidden], before["tokens"][~hidden])
    assert np.array_equal(after["labels"][hidden], before["tokens"][hidden])
    assert (after["labels"][~hidden] == IGNORE).all()
    assert np.array_equal(after["positions"], before["positions"])
    assert before["tokens"].max() < MASK_ID  # the row that was given is left alone


def test_three_tenths_are_hidden_and_no_special_token():
    change = MaskTokens(0.3, MASK_ID, SPECIAL, seed=3)
    rows = [tokens_row(n) for n in range(200)]
    hidden = np.stack([change(row, n)["tokens"] == MASK_ID for n, row in enumerate(rows)])
    special = np.isin(np.stack([row["tokens"] for row in rows]), SPECIAL)
    assert special.mean() > 0.04 and not hidden[special].any()
    rate = hidden[~special].mean()
    assert abs(rate - 0.3) < 5 * (0.3 * 0.7 / (~special).sum()) ** 0.5  # five standard deviations
    by_place = hidden.mean(0)
    assert by_place.min() > 0.1 and by_place.max() < 0.5  # no place is spared


def test_masks_depend_on_seed_and_sample():
    row = tokens_row(0)
    masks = {
        (seed, sample): tuple(MaskTokens(0.3, MASK_ID, SPECIAL, seed)(row, sample)["tokens"])
        for seed in (0, 1)
        for sample in (0, 1, 2**33)
    }
    assert len(set(masks.values())) == 6
    assert masks[1, 2**33] == tuple(MaskTokens(0.3, MASK_ID, SPECIAL, 1)(row, 2**33)["tokens"])


def kept_tokens(change: MaskContexts, samples: int, shape: tuple[int, int]) -> np.ndarray:
    """How many tokens of each context are seen; asserts that what is lost is a suffix."""
    contexts = np.zeros(shape, np.int64)
    masks = np.stack([change({"contexts": contexts}, n)["context_mask"] for n in range(samples)])
    assert masks.dtype == bool
    assert not (masks[..., 1:] & ~masks[..., :-1]).any()
    return masks.sum(-1)


def test_a_third_of_contexts_lose_a_suffix_and_a_tenth_of_them_all():
    kept = kept_tokens(MaskContexts(0.3, 0.1, seed=0), 1000, (16, 8)).ravel()
    masked = kept[kept < 8]
    assert abs(len(masked) / len(kept) - 0.3) < 0.02
    assert abs((masked == 0).mean() - 0.1) < 0.02
    counts = np.bincount(masked[masked > 0], minlength=8)[1:]  # 1 to 7 tokens are left
    assert len(counts) == 7 and np.abs(counts / counts.sum() - 1 / 7).max() < 0.02


def test_contexts_keep_all_or_nothing_at_the_ends():
    assert (kept_tokens(MaskContexts(0.0, 0.5, seed=0), 20, (4, 8)) == 8).all()
    assert (kept_tokens(MaskContexts(1.0, 1.0, seed=0), 20, (4, 8)) == 0).all()
    some = kept_tokens(MaskContexts(1.0, 0.0, seed=0), 200, (4, 8))
    assert some.min() == 1 and some.max() == 7


@pytest.mark.parametrize("sample", [0, 5])
def test_masks_of_contexts_and_tokens_are_not_of_one_stream(sample):
    row = {"tokens": np.full(64, 9), "contexts": np.zeros((64, 8), np.int64)}
    tokens = MaskTokens(0.5, MASK_ID, SPECIAL, 0)(row, sample)["tokens"] == MASK_ID
    contexts = MaskContexts(0.5, 1.0, 0)(row, sample)["context_mask"][:, 0]
    assert not np.array_equal(tokens, ~contexts)
