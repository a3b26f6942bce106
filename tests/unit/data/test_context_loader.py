"""The loader of windows: shares of kinds and stores, what it refuses, and masks on any ranks."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from longctx.config import ContextsConfig, DataConfig
from longctx.data.context_loader import Stores, windowed
from longctx.data.masks import MaskContexts, MaskTokens
from longctx.errors import UserError
from tests.helpers.numbered import stores

DATA = DataConfig(store=["a"], held_out=[], seq_len=8, packing="concat", mask_documents=False)
CONTEXTS = ContextsConfig(count=4, size=4, documents=2, stream=1)


def loader(data=DATA, contexts=CONTEXTS, documents=None, stream=None, **more):
    # A store's tokens count through all its documents, so a token tells where it is from.
    documents = documents or Stores("data.store", stores([40, 5, 60], [9, 80]), None)
    settings = {"batch_rows": 12, "micro_batch_rows": 2, "seed": 0, **more}
    return windowed(documents, stream or documents, data, contexts, **settings)


def test_two_windows_of_long_documents_for_one_of_the_stream():
    found = loader()
    drawn = [found.place(n)[0] for n in range(300)]
    assert drawn.count(0) == 200 and drawn.count(1) == 100
    # 40, 60 and 80 tokens hold (L - 16) / 8 windows; the stream of 194 holds (194 - 16) / 8
    assert [len(source) for source in found.sources] == [3 + 5 + 8, 22]
    first, second = found.describe(30)
    assert "data.store: 5 documents, inside long documents, 16 windows of 4 x 4" in first
    assert "66.7% of the rows" in first and "one stream, 22 windows" in second


def test_context_ends_where_the_row_begins():
    found = loader(contexts=replace(CONTEXTS, stream=0))
    for n in range(48):
        batch = found.batch([n])
        start = int(batch.tokens[0, 0])
        assert batch.contexts.shape == (1, 4, 4) and batch.context_mask is None
        assert batch.contexts.flatten().tolist() == list(range(start - 16, start))
        assert batch.tokens[0].tolist() == list(range(start, start + 8))
        assert batch.labels[0, :-1].tolist() == list(range(start + 1, start + 8))


def test_the_warm_up_reads_its_own_row():
    contexts = ContextsConfig(count=2, size=4, repeat=True)
    batch = loader(contexts=contexts).batch(list(range(20)))
    assert torch.equal(batch.contexts.flatten(1), batch.tokens)


def test_without_contexts_rows_tile_the_stream():
    found = loader(contexts=ContextsConfig())
    assert len(found.sources[0]) == 194 // 8
    batch = found.batch(list(range(24)))
    assert batch.contexts is None and batch.context_mask is None
    assert len(set(batch.tokens.flatten().tolist())) == 24 * 8  # each token once in an epoch


def test_stores_are_drawn_by_their_weights_inside_each_kind():
    documents = Stores("data.store", stores([40], [60]), [3, 1])
    stream = Stores("contexts.stream_store", stores([90], [50], [70]), [0.5, 0.25, 0.25])
    found = loader(documents=documents, stream=stream)
    drawn = np.bincount([found.place(n)[0] for n in range(1200)])
    assert drawn.tolist() == [600, 200, 200, 100, 100]


@pytest.mark.parametrize(
    "change", [MaskContexts(0.5, 0.5, seed=1), MaskTokens(0.3, 999, (), seed=1)]
)
def test_masks_and_rows_are_the_same_for_any_ranks(change):
    def rows(ranks, micro):
        found = loader(change=change, micro_batch_rows=micro)
        batches = [b for rank in range(ranks) for b in found.step(3, rank, ranks)]
        fields = [b.tensors() for b in batches]
        return {
            str([value[i].flatten().tolist() for value in batch.values()])
            for batch in fields
            for i in range(micro)
        }

    alone = rows(1, 12)
    assert len(alone) == 12
    assert rows(2, 3) == rows(3, 1) == alone
    plain = {b.tokens.numpy().tobytes() for b in loader(change=None).step(3, 0, 1)}
    assert plain  # and the rows themselves are those without masks, where contexts are masked
    if isinstance(change, MaskContexts):
        assert {b.tokens.numpy().tobytes() for b in loader(change=change).step(3, 0, 1)} == plain


def test_masks_are_new_in_the_next_epoch():
    found = loader(contexts=ContextsConfig(), change=MaskTokens(0.3, 999, (), seed=1))
    size = len(found.sources[0])
    epochs = [found.batch(list(range(e * size, (e + 1) * size))) for e in (0, 1)]
    masks = [torch.where(b.tokens == 999, b.labels, -1).flatten().tolist() for b in epochs]
    assert set(masks[0]) != set(masks[1])


def test_what_decides_the_rows_is_in_the_identity():
    base = loader().identity
    others = [
        loader(contexts=replace(CONTEXTS, stream=2)),
        loader(contexts=replace(CONTEXTS, mask=0.3)),
        loader(contexts=replace(CONTEXTS, mask=0.3, mask_whole=0.2)),
        loader(data=replace(DATA, mask_rate=0.3)),
        loader(seed=1),
        loader(documents=Stores("data.store", stores([90]), None)),
    ]
    assert len({str(sorted(x.identity.items())) for x in others}) == 6
    assert all(x.identity != base for x in others)


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"packing": "best_fit"}, "data.packing=best_fit: windows of a text are cut; use concat"),
        ({"mask_documents": True}, "data.mask_documents=true: windows are one stream each"),
        ({"long_tokens": 9}, "data.long_tokens does not apply here"),
        ({"seq_len": 70}, "data.store has no document of 86 tokens: contexts of 16 and a row of"),
    ],
)
def test_what_does_not_fit_is_refused(changed, line):
    with pytest.raises(UserError, match=line):
        loader(data=replace(DATA, **changed))


def test_a_stream_that_is_too_short_is_refused():
    with pytest.raises(UserError, match=r"data.store holds 9 tokens, less than 24: contexts of 16"):
        loader(
            contexts=replace(CONTEXTS, documents=0),
            documents=Stores("data.store", stores([4, 5]), None),
        )


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"count": -1}, "contexts.count=-1 must not be below 0"),
        ({"count": 2}, "contexts.size=0 must be above 0"),
        ({"documents": 0, "stream": 0}, "contexts.documents . contexts.stream=0 must be above 0"),
        ({"mask": 1.5}, "contexts.mask=1.5 must be between 0 and 1"),
        ({"stream_store": ["a"], "stream_weights": [1, 2]}, "has 2 numbers for 1 directories"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, line):
    with pytest.raises(UserError, match=line):
        ContextsConfig(**values)
