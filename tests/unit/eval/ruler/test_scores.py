import pytest

from longctx.eval.ruler.scores import ENOUGH, effective, effective_length


@pytest.mark.parametrize(
    ("scores", "length"),
    [
        ([0.9, 0.86, 0.85, 0.1], 8192),
        ([0.9, 0.5, 0.856, 0.1], 16384),  # the largest that reaches it, whatever is before
        ([0.85, 0.8, 0.1, 0], 0),
    ],
)
def test_the_largest_length_that_reaches_the_threshold(scores, length):
    averages = [{"length": 4096 * 2**i, "score": s} for i, s in enumerate(scores)]
    assert effective_length(averages, 85.6) == length


def result(*scores, half=0.05, samples=(ENOUGH, ENOUGH)):
    averages = [
        {"length": 4096 * 2**i, "score": s, "interval": [s - half, s + half]}
        for i, s in enumerate(scores)
    ]
    cells = [{"samples": n} for n in samples]
    return {"threshold": 85.6, "averages": averages, "cells": cells}


@pytest.mark.parametrize(
    ("scores", "half", "written"),
    [
        ((0.95, 0.88, 0.82, 0.1), 0.05, "8,192 [4,096, 16,384]"),
        ((0.95, 0.88, 0.82, 0.1), 0.01, "8,192"),
        ((0.86, 0.2), 0.05, "4,096 [none, 4,096]"),
        ((0.2, 0.1), 0.05, "none"),
    ],
)
def test_the_interval_goes_with_it(scores, half, written):
    assert str(effective(result(*scores, half=half))) == written


def test_a_few_lucky_samples_tell_none():
    assert effective(result(1.0, 1.0, half=0.0, samples=(ENOUGH, ENOUGH - 1))) is None
    assert str(effective(result(1.0, 1.0, half=0.0))) == "8,192"
