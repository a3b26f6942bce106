"""Laws of windows: decoder segments tile the text, contexts are what stands before them."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.data.context_windows import Windows, in_documents, in_stream, warm_up

LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=20)
SIZES = {"context": st.integers(0, 24), "decoder": st.integers(1, 12)}


def tokens(windows: Windows, number: int) -> list[tuple[int, int]]:
    """(document, place) of each token of a window."""
    return [(d, s + i) for d, s, n in windows.rows.pieces(number) for i in range(n)]


@given(lengths=LENGTHS, **SIZES)
@settings(max_examples=80, deadline=None)
def test_windows_tile_each_document(lengths, context, decoder):
    windows = in_documents(np.array(lengths), context, decoder)
    tiled: dict[int, list[int]] = {}
    for number in range(len(windows)):
        found = tokens(windows, number)
        document, begin = found[0]
        assert found == [(document, begin + i) for i in range(context + decoder)]
        tiled.setdefault(document, []).extend(i for _, i in found[context:])
    for document, length in enumerate(lengths):
        count = max((length - context) // decoder, 0)
        assert tiled.get(document, []) == list(range(context, context + count * decoder))
        assert (count > 0) == (length >= context + decoder)


@given(lengths=LENGTHS, seed=st.integers(0, 3), **SIZES)
@settings(max_examples=80, deadline=None)
def test_windows_tile_the_stream(lengths, seed, context, decoder):
    windows = in_stream(np.array(lengths), context, decoder, seed)
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(lengths))
    stream = [(d, i) for d in order for i in range(lengths[d])]
    size = context + decoder
    assert len(windows) == max((len(stream) - context) // decoder, 0)
    for number in range(len(windows)):
        assert tokens(windows, number) == stream[number * decoder :][:size]


@given(lengths=LENGTHS, decoder=st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_warm_up_windows_repeat_the_decoder(lengths, decoder):
    windows = warm_up(in_documents(np.array(lengths), 0, decoder))
    assert windows.context == windows.decoder == decoder
    seen = [t for n in range(len(windows)) for t in tokens(windows, n)]
    assert seen == [(d, i) for d, n in enumerate(lengths) for i in range(n // decoder * decoder)]
