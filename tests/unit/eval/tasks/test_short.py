import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from longctx.errors import UserError
from longctx.eval.tasks import short
from tests.helpers.fakes import Fake, Memory, characters
from tests.helpers.reading import subject

OWN = short.Short(["continuation"], 6, 150)


def document(letter: str) -> list[int]:
    """Its sentences have no letter but their own."""
    return characters(" ".join(f"{letter * (2 + i % 4)} {letter * 3} {letter * 5} {letter}{letter}." for i in range(60)))  # fmt: skip  # noqa: E501


STORE = Memory([document(c) for c in "abcdef"])


def reading(store=STORE, size=150):
    return short.Reading(store, characters, lambda t: "".join(map(chr, t)), size, "store")


def echo():
    """What was seen often is likely."""

    def logits(tokens):
        counts = torch.nn.functional.one_hot(tokens, 128).cumsum(1).float()
        return (counts + 0.1).log()

    return Fake(logits)


def test_questions_are_the_next_sentence_among_three_of_other_documents():
    made = list(reading().questions(6, 0))
    assert made == list(reading().questions(6, 0)) != list(reading().questions(6, 1))
    for question in made:
        own = chr(97 + question.document)
        assert set(question.context) == {own, " ", "."} and question.context.endswith(".")
        assert len(question.context) <= 150 < len(question.context) + len(question.choices[0]) + 1
        letters = [choice[0] for choice in question.choices]
        assert letters[0] == own and len(set(letters)) == 4
        text = "".join(map(chr, STORE.documents[question.document]))
        assert f"{question.context} {question.choices[0]}" in text


def test_losses_are_means_over_the_tokens_of_each_choice():
    model, prompt = echo(), characters("aab")
    found = short.losses(model, prompt, [characters("ab"), characters("c")])
    # After "aab" of 3 tokens: (count + 0.1) / (seen + 12.8).
    want = [-(math.log(2.1 / 15.8) + math.log(1.1 / 16.8)) / 2, -math.log(0.1 / 15.8)]
    assert found == pytest.approx(want, rel=1e-5)
    alone = [short.losses(model, prompt, [c])[0] for c in (characters("ab"), characters("c"))]
    assert found == pytest.approx(alone)


def cfg(**changes):
    return SimpleNamespace(short=replace(OWN, **changes), seed=0)


def asked(model):
    return subject(model, bos=1)


def test_who_looks_is_right_and_who_does_not_guesses(monkeypatch):
    monkeypatch.setattr(short.Short, "_reading", lambda *_: reading())
    result, records = cfg().short.run(cfg(), asked(echo()))
    [row] = result["cells"]
    assert (row["score"], row["samples"], row["guessing"]) == (1.0, 6, 0.25)
    assert row["interval"] == pytest.approx([0.6097, 1], abs=1e-4)
    assert [r["index"] for r in records] == list(range(6)) and len(records[0]["losses"]) == 4
    stubborn = Fake(lambda t: torch.arange(128.0).expand(*t.shape, 128))  # likes late letters
    result, _ = cfg(samples=40).short.run(cfg(), asked(stubborn))
    assert 0 < result["cells"][0]["score"] < 0.7


def test_a_model_that_knows_nothing_is_not_right(monkeypatch):
    """The right sentence stands first, which is where the least of equal numbers is found."""
    monkeypatch.setattr(short.Short, "_reading", lambda *_: reading())
    flat = Fake(lambda tokens: torch.zeros(*tokens.shape, 128))
    assert cfg().short.run(cfg(), asked(flat))[0]["cells"][0]["score"] == 0
    broken = Fake(lambda tokens: torch.full((*tokens.shape, 128), torch.nan))
    with pytest.raises(UserError, match=r"short: the model's loss is not finite behind question 0"):
        cfg().short.run(cfg(), asked(broken))


def test_too_little_text_is_told():
    with pytest.raises(UserError, match=r"store has 3 documents of 278 tokens or more, and contin"):
        list(reading(Memory(STORE.documents[:3])).questions(1, 0))
    dull = Memory([characters("no stop " * 100)] * 4)
    with pytest.raises(UserError, match=r"document \d: no 150 tokens of whole sentences"):
        list(reading(dull).questions(1, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": []}, "at least one of continuation"),
        ({"tasks": ["arc"]}, "'arc' is not one of continuation, boolq"),
        ({"samples": 0}, "short.samples=0"),
        ({"context_tokens": 0}, "short.context_tokens=0"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(UserError, match=message):
        replace(OWN, **change)
