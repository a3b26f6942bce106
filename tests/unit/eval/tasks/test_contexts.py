from dataclasses import replace

import numpy as np
import pytest

from longctx.errors import UserError
from longctx.eval.protocols import Text, token_matched
from longctx.eval.tasks.contexts import (
    Contexts,
    Plan,
    measure,
    strangers,
    tail_ends,
    windows_behind,
)
from tests.helpers.fakes import Memory, unigram
from tests.helpers.reading import BagWithEncoder, bag, bag_nll

OWN = Contexts(["cepe_tail_matched"], [0, 2, 5], 8, 24, 10, True, 3, None)
P = [0.5, 0.3, 0.15, 0.05]
MATCHED, TAIL = "cepe_tail_matched", "cepe_tail"


def documents(*lengths, vocab=4):
    rng = np.random.default_rng(0)
    return Memory([rng.integers(0, vocab, n) for n in lengths])


def plan(own=OWN, batch_tokens=256, *lengths):
    store = documents(*(lengths or (120, 200)))
    return Plan(store, range(len(store.lengths)), own, batch_tokens)


def rows(result, **wanted):
    return [r for r in result["rows"] if all(r[key] == value for key, value in wanted.items())]


def test_unigram_closed_form_and_exactly_t_targets_a_sample():
    """Acceptance 23."""
    made = plan()
    result, records = measure(unigram(P), made, MATCHED)
    seen = [r for r in records if r["context"] == "none"]
    assert len(seen) == 6 and len(result["rows"]) == 5
    targets = [made.documents.documents[r["document"]][-10 + r["span"][1] :][:10] for r in seen]
    nll = -np.log(np.array(P))[np.stack(targets)].mean()
    for row in result["rows"]:
        assert row["perplexity"] == pytest.approx(np.exp(nll), rel=1e-6)
        assert row["tokens"] == 10 * row["samples"] == 60
        assert row["gain"] == pytest.approx(0, abs=1e-9)
    assert {r["span"][1] - r["first_scored"] for r in records} == {10}


@pytest.mark.parametrize("protocol", [MATCHED, TAIL])
def test_batches_change_nothing(protocol):
    one, _ = measure(bag(4), plan(batch_tokens=1), protocol)
    many, _ = measure(bag(4), plan(batch_tokens=10_000), protocol)
    for a, b in zip(one["rows"], many["rows"], strict=True):
        assert a.pop("context") == b.pop("context")
        assert a == pytest.approx(b, abs=1e-6)


def test_contexts_in_front_are_longer_windows_and_none_is_the_plain_model():
    own = replace(OWN, other=False)
    made = plan(own)
    result, _ = measure(bag(4), made, MATCHED)
    text = Text(made.documents, made.chosen, 256)
    plain = token_matched(bag(4), text, [24, 24 + 2 * 8, 24 + 5 * 8], 10, 3)
    want = [row["nll"] for row in plain["rows"]]
    assert [row["nll"] for row in result["rows"]] == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("protocol", [MATCHED, TAIL])
def test_an_encoder_gets_the_same_tokens(protocol):
    model = BagWithEncoder(4)
    inside, _ = measure(model, plan(), protocol)
    front, _ = measure(bag(4), plan(), protocol)
    for a, b in zip(inside["rows"], front["rows"], strict=True):
        assert a["nll"] == pytest.approx(b["nll"], rel=1e-6)
    assert {shape[1:] for shape in model.encoded} == {(2, 8), (5, 8)}
    assert {shape[1] for shape in model.shapes} == {24}  # no contexts: the decoder alone


def test_a_sample_by_hand():
    made = plan(OWN, 256, 64, 80)
    result, records = measure(bag(4), made, MATCHED)
    for kind in ("own", "other"):
        nlls = []
        for r in (r for r in records if (r["count"], r["context"]) == (5, kind)):
            own = made.documents.documents[r["document"]].tolist()
            source, begin, end = r["contexts_from"]
            beside = made.documents.documents[source].tolist()[begin:end]
            assert len(beside) == 40 and (source == r["document"]) == (kind == "own")
            if kind == "own":
                assert end == r["span"][0]
            first, stop = r["first_scored"], r["span"][1]
            nll = bag_nll(own[first:stop], beside + own[r["span"][0] : first], 4).mean()
            assert r["nll"] == pytest.approx(nll, rel=1e-5)
            nlls.append(nll)
        [row] = rows(result, count=5, context=kind)
        assert row["nll"] == pytest.approx(np.mean(nlls), rel=1e-5)  # of samples = of tokens


def test_the_same_tokens_are_scored_under_every_count():
    _, records = measure(unigram(P), plan(), MATCHED)
    places = {}
    for r in records:
        places.setdefault((r["count"], r["context"]), []).append((r["document"], *r["span"]))
    assert len(places) == 5 and len({tuple(p) for p in places.values()}) == 1


def test_the_right_context_helps_and_another_s_does_not():
    """Each document has a vocabulary of its own, so only its own context tells of it."""
    made = Plan(Memory([[0, 1] * 60, [2, 3] * 60]), [0, 1], OWN, 512)
    result, _ = measure(BagWithEncoder(4), made, MATCHED)
    own, other = rows(result, context="own"), rows(result, context="other")
    assert own[0]["gain"] > own[0]["gain_se"] > -1 and own[1]["gain"] > own[0]["gain"] > 0
    assert other[1]["gain"] < other[0]["gain"] < 0
    [none] = rows(result, context="none")
    assert none["gain"] == 0
    assert own[1]["gain"] == pytest.approx(none["nll"] - own[1]["nll"])


def test_tail_windows_slide_by_the_scored_tokens():
    made = plan(replace(OWN, windows=100), 256, 100, 70)
    ends = tail_ends(made, 2)
    assert ends == [(0, e) for e in range(40, 101, 10)] + [(1, e) for e in range(40, 71, 10)]
    assert tail_ends(plan(OWN, 256, 100), 2) == [(0, 40), (0, 70), (0, 100)]
    windows = windows_behind(OWN, ends, 2, "own")
    assert windows[1].contexts == ((0, 10, 18), (0, 18, 26))
    assert (windows[1].start, windows[1].first, windows[1].stop) == (26, 40, 50)


def test_strangers_are_of_the_next_document():
    assert strangers([(3, 50), (3, 60), (7, 70)]) == [(7, 70), (7, 70), (3, 50)]
    with pytest.raises(AssertionError, match="another document"):
        strangers([(3, 50), (3, 60)])


@pytest.mark.parametrize(
    ("count", "decoder", "total"),
    [(8, 2048, 4096), (16, 4096, 8192), (112, 4096, 32_768), (496, 4096, 131_072)],
)
def test_the_paper_s_lengths(count, decoder, total):
    """Acceptance 24."""
    own = Contexts([TAIL], [0, count], 256, decoder, 256, True, 1, None)
    assert own.longest == total
    [window] = windows_behind(own, [(0, total)], count, "own")
    assert sum(window.shape[::2]) == total and window.contexts[0] == (0, 0, 256)
    assert window.shape[1] == 256 and window.contexts[-1][2] == window.start


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": []}, r"contexts.counts=\[\]"),
        ({"counts": [4, 4]}, "distinct numbers"),
        ({"counts": [-1]}, "at least 0"),
        ({"target_tokens": 24}, "target_tokens=24 must be below contexts.decoder_tokens=24"),
        ({"protocols": ["tail"]}, "'tail' is not one of cepe_tail_matched"),
        ({"size": 0}, "contexts.size=0"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(UserError, match=message):
        replace(OWN, **change)
