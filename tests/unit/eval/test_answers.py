import pytest

from longctx.eval.answers import (
    bootstrap,
    contained,
    exact,
    f1,
    holds,
    interval,
    normalise,
    wilson,
)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("The Eiffel Tower", "eiffel tower"),
        ("  an   apple,\ta day\n", "apple day"),
        ("U.S.A.", "usa"),
        ("well-known", "wellknown"),
        ("$1,000.50", "100050"),
        ("theory and anatomy", "theory and anatomy"),
        ("A", ""),
        ("Saint-Étienne's", "saintétiennes"),
        ("a.b", "ab"),
    ],
)
def test_normalisation(text, want):
    assert normalise(text) == want


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "sub_em", "f1_score"),
    [
        ("the Norse", ["Norse"], True, True, 1.0),
        ("Norse.", ["Danes", "Norse"], True, True, 1.0),
        ("the Norse people", ["Norse"], False, True, 2 / 3),
        ("Denmark and Iceland", ["Denmark, Iceland and Norway"], False, False, 6 / 7),
        ("in 1066", ["1066", "the year 1066"], False, True, 2 / 3),
        ("nothing", ["Norse"], False, False, 0.0),
        ("", ["Norse"], False, False, 0.0),
        ("to be to be", ["to be"], False, True, 2 / 3),
        ("to be to be", ["to be to go"], False, False, 3 / 4),  # bags, not sets
        ("Northern", ["north"], False, True, 0.0),  # sub-EM is of characters
        ("the", ["The"], True, True, 1.0),  # nothing is left of both
        ("word", ["The"], False, False, 0.0),
    ],
)
def test_scores(prediction, answers, em, sub_em, f1_score):
    assert exact(prediction, answers) is em
    assert contained(prediction, answers) is sub_em
    assert f1(prediction, answers) == pytest.approx(f1_score)


def test_a_passage_holds_an_answer_as_whole_words():
    assert holds("It was the U.S. Army.", ["US army"])
    assert not holds("Northern lights", ["north"])
    assert not holds("anything", ["the"])


@pytest.mark.parametrize(
    ("right", "of", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_wilson(right, of, low, high):
    assert wilson(right, of) == pytest.approx((low, high), abs=1e-4)


def test_bootstrap():
    values = [0.0, 1.0] * 50
    low, high = bootstrap(values)
    assert 0.38 < low < 0.43 and 0.57 < high < 0.62  # 0.5 +- 1.96 * 0.05
    assert bootstrap(values) == (low, high)
    assert bootstrap([0.25] * 7) == pytest.approx((0.25, 0.25))


def test_an_interval_has_a_width():
    assert interval([1, 1, 0.0, 1.0]) == wilson(3, 4) and interval([1.0] * 5) == wilson(5, 5)
    assert interval([0.25] * 8) == wilson(2, 8)
    assert interval([0.25, 0.5, 1]) == bootstrap([0.25, 0.5, 1])
