"""The template, its three kinds and what is held out."""

import random
from itertools import islice

import pytest

from longctx.data.instructions import HELD_OUT, KINDS, Instruction, instructions, reply
from longctx.errors import UserError


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_held_out_instructions_never_meet(kind):
    made = {out: list(islice(instructions(kind, 0, out), 1500)) for out in (True, False)}
    asked = {out: {(i.question, i.answer) for i in found} for out, found in made.items()}
    assert not asked[True] & asked[False]
    assert all(len({i.text for i in found}) == 1500 for found in made.values())
    assert next(instructions(kind, 1, True)) != made[True][0]
    assert list(islice(instructions(kind, 0, True), 9)) == made[True][:9]


def test_a_tenth_is_held_out():
    draw = random.Random(0)
    out = sum(KINDS["key"](draw).held_out for _ in range(5000))
    assert abs(out / 5000 - 1 / HELD_OUT) < 0.02


def test_right_answers_are_right():
    for made in islice(instructions("key", 0, False), 200):
        name = made.question.removeprefix("What is the pass key of ").removesuffix("?")
        assert f"The pass key of {name} is {made.answer}." in made.passage
    for made in islice(instructions("list", 0, False), 200):
        names = made.question.removesuffix("?").split(" one of ")[1].split(", ")
        assert made.answer == names[0 if " first " in made.question else -1]
    for made in islice(instructions("repeat", 0, False), 200):
        often, *then = made.question.removesuffix(".").split(", then ")
        word, times = often.split()[1], 3 if "three" in often else 2
        assert made.answer.split() == [word] * times + then


def test_the_template_is_taken_to_the_letter():
    made = Instruction("key", "It is 7.", "What?", "7")
    assert made.text == "It is 7.\nQuestion: What?\nAnswer: 7\nDone."
    assert reply(made.text.removeprefix(made.prompt)) == "7"
    for wrong in (
        "Answer: 7", "Answer: 7\nDone", "Answer: 7\nDone.\n", "7\nDone.", "Answer: \nDone.",
        "Answer: 7\n8\nDone.", " Answer: 7\nDone.", "Answer: 7 \nDone.",
    ):  # fmt: skip
        assert reply(wrong) is None, wrong


def test_a_kind_with_few_instructions_says_so(monkeypatch):
    monkeypatch.setitem(KINDS, "one", lambda draw: Instruction("one", "", "Which?", "this"))
    made = instructions("one", 0, Instruction("one", "", "Which?", "this").held_out)
    next(made)
    with pytest.raises(UserError, match="no more than 1 different instructions of kind one"):
        next(made)
