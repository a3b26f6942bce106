import re
from dataclasses import replace
from random import Random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from longctx.errors import UserError
from longctx.eval.tasks import babi
from tests.helpers.fakes import characters
from tests.helpers.material import write_material
from tests.helpers.reading import settings, subject

OWN = babi.Babi([1, 2, 3], 10, 3, "essays", 12)


def ask(facts: list[str], question: str) -> str | None:
    """Plays a story through, independently of how it was told."""
    where, holder, lies, been = {}, {}, {}, {}
    for fact in facts:
        person = fact.split()[0]
        thing = re.search(r"the (apple|football|milk)", fact)
        if place := re.search(r"to the (\w+)\.", fact):
            where[person] = place[1]
        elif fact.endswith("there."):
            holder[thing[1]] = person
        else:
            assert holder.pop(thing[1]) == person, "nobody drops what they do not have"
            lies[thing[1]] = where[person]
        for name, who in holder.items():
            if not been.get(name) or been[name][-1] != where[who]:
                been.setdefault(name, []).append(where[who])
    if found := re.match(r"Where is (\w+)\?", question):
        return where.get(found[1])
    if found := re.match(r"Where is the (\w+)\?", question):
        name = found[1]
        return where[holder[name]] if name in holder else lies[name]
    name, place = re.match(r"Where was the (\w+) before the (\w+)\?", question).groups()
    assert been[name].count(place) == 1
    return been[name][been[name].index(place) - 1]


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_every_story_has_the_answer_it_says(hops):
    answers = set()
    for seed in range(300):
        story = babi.tell(hops, 6 + seed % 12, Random(seed))
        assert ask(story.facts, story.question) == story.answer
        assert 1 <= len(story.supporting) <= hops
        assert list(story.supporting) == sorted(story.supporting)
        answers.add(story.answer)
    assert answers == set(babi.PLACES)


def test_supporting_facts_are_needed():
    """The place is named in them, and with three hops a move away from it too."""
    for hops in (1, 2, 3):
        for seed in range(100):
            story = babi.tell(hops, 10, Random(seed))
            told = [story.facts[i] for i in story.supporting]
            assert any(f"the {story.answer}." in fact for fact in told)
            if hops > 1:
                assert any(fact.endswith("there.") for fact in told)


class Reader(nn.Module):
    """Plays what it sees of the last story; people, places and things stand out from the text."""

    def __init__(self, sees: int = 10**6, manner: str = " {}\nQuestion") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.sees, self.manner = sees, manner
        self.config = SimpleNamespace(max_position_embeddings=10**6)

    def generate(self, input_ids, max_new_tokens, **settings):
        seen = "".join(map(chr, input_ids[0].tolist()))[-self.sees :]
        *_, body, question, answer = re.split(r"\n\n|\nQuestion: |\nAnswer:", seen)
        assert answer == ""
        facts = re.findall(r"(?:Daniel|John|Mary|Sandra) [^.]*\.", body)
        try:
            reply = self.manner.format(ask(facts, question))
        except (KeyError, AssertionError, ValueError, IndexError):
            reply = " nowhere"
        return torch.cat([input_ids, torch.tensor([characters(reply)[:max_new_tokens]])], dim=1)


@pytest.fixture
def cfg(tmp_path):
    own = SimpleNamespace(data=str(write_material(tmp_path)))
    return settings(babi=OWN, ruler=own, lengths=[4000, 2600], seed=0, held_out=None)


def asked(model):
    return subject(model, bos=1)


def test_who_reads_all_is_right_and_who_reads_the_end_is_not(cfg):
    result, records = cfg.babi.run(cfg, asked(Reader()))
    assert [(c["hops"], c["length"]) for c in result["cells"]] == [
        (hops, length) for length in (2600, 4000) for hops in (1, 2, 3)
    ]
    assert {c["score"] for c in result["cells"]} == {1.0}
    assert result["cells"][0]["interval"] == pytest.approx([0.4385, 1], abs=1e-4)
    for record in records:
        assert record["length"] - 90 < record["tokens"] + 12 <= record["length"]
        assert 1 <= len(record["depths"]) == len(record["evidence"]) <= record["hops"]
        assert all(0 <= depth <= 1 for depth in record["depths"])
    result, _ = cfg.babi.run(cfg, asked(Reader(sees=150)))
    assert sum(c["score"] for c in result["cells"]) <= 3 < len(result["cells"])


@pytest.mark.parametrize(
    ("manner", "score"), [(" The {}.\n", 1.0), ("\n{}\n", 1.0), (" in the {}", 0.0), (" no\n{}", 0)]
)
def test_the_word_alone_on_the_first_line_is_right(cfg, manner, score):
    cfg.babi = replace(OWN, hops=[1], new_tokens=20)
    result, _ = cfg.babi.run(cfg, asked(Reader(manner=manner)))
    assert {c["score"] for c in result["cells"]} == {score}


def test_the_prompt_has_two_examples_and_facts_in_order(cfg):
    _, records = cfg.babi.run(cfg, asked(Reader()))
    text = next(r["prompt"] for r in records if r["prompt"] and r["hops"] == 3)
    head, one, two, story = text.split("\n\n")
    assert head == babi.HEAD
    for example in (one, two):
        facts, question, answer = re.split(r"\nQuestion: |\nAnswer: ", example)
        assert ask(re.findall(r"[^.]+\.", facts.replace(". ", ".")), question) == answer
    body, rest = story.split("\nQuestion: ")
    assert rest.endswith("?\nAnswer:") and "Sentence" in body
    assert len(re.findall(r"(?:Daniel|John|Mary|Sandra) ", body)) == OWN.facts


def test_a_length_without_room_is_named(cfg):
    cfg.lengths = [700]
    with pytest.raises(UserError, match=r"babi: 1 hop, sample 0: its shortest prompt of .* 12 for"):
        cfg.babi.run(cfg, asked(Reader()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hops": [0]}, "babi.hops"),
        ({"hops": [4]}, "from 1 to 3"),
        ({"facts": 5}, "babi.facts=5"),
        ({"samples": 0}, "babi.samples=0"),
        ({"haystack": "x"}, "babi.haystack='x'"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(UserError, match=message):
        replace(OWN, **change)
