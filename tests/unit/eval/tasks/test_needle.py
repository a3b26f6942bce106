import re
from dataclasses import replace
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest

from longctx.data.passkey_text import Passkey
from longctx.errors import UserError
from longctx.eval.haystack import Haystack, haystack
from longctx.eval.tasks import needle
from tests.helpers.fakes import Memory, characters, copier, noise
from tests.helpers.material import ESSAY, write_material
from tests.helpers.reading import settings, subject

TEXT = " ".join(f"Line {i} tells of {chr(97 + i % 26)}." for i in range(300))
HAY = Haystack(
    Memory([characters(TEXT), characters(TEXT.upper())]), lambda t: "".join(map(chr, t)), "hay"
)
OWN = needle.Needle([0, 0.5, 1], 2, "essays", "teacher_forced")
LENGTHS = [900, 600]


def hide(length=800, depth=0.5, seed=0, index=0, hay=HAY):
    return needle.hide(hay, characters, 1, length, depth, seed, index)


def text_of(prompt: Passkey) -> str:
    return "".join(map(chr, prompt.tokens[1:]))


@pytest.fixture
def cfg(tmp_path):
    own = SimpleNamespace(data=str(write_material(tmp_path)))
    return settings(
        needle=OWN, ruler=own, lengths=LENGTHS, seed=0, batch_tokens=4096, held_out=None
    )


def asked(model):
    return subject(model, bos=1)


@pytest.mark.parametrize("depth", [0, 0.3, 1])
def test_the_prompt(depth):
    prompt = hide(depth=depth)
    text = text_of(prompt)
    found = re.fullmatch(
        r"A special magic number is hidden within the following text\. Make sure to memorize it\. "
        r"I will quiz you about the number afterwards\.\n(.*)\nWhat is the special magic number of "
        r"(\w+)\? The special magic number of \2 is (\d{7})",
        text,
    )
    body, city, number = found.groups()
    fact = f"The special magic number of {city} is {number}."
    assert body.count(fact) == 1 and prompt.key == number
    before, after = (part.strip() for part in body.split(fact))
    count = [len(re.findall(r"[.] |[.]$", part)) for part in (before, after)]
    assert count[0] == round(depth * sum(count)) and sum(count) > 20
    assert prompt.tokens[0] == 1 and text[slice(*(i - 1 for i in prompt.answer))] == f" {number}"
    assert prompt.distance == len(text) - len(f" {number}") - text.index(fact) + (depth > 0)


def test_lengths_are_nearly_reached_and_draws_differ():
    lengths = [len(hide(length=n, index=i).tokens) for n in (500, 800) for i in range(4)]
    assert all(n - 25 <= made <= n for made, n in zip(lengths, [500] * 4 + [800] * 4, strict=True))
    assert hide() == hide() and len({hide(index=i).key for i in range(9)}) == 9
    assert hide(seed=1).key != hide().key != hide(depth=0.6).key


def test_a_copier_finds_all_and_noise_nothing(cfg):
    """Acceptance 3 for the needle map, and decoding agrees with the single forward."""
    result, records = cfg.needle.run(cfg, asked(copier()))
    assert [(c["length"], c["depth"]) for c in result["cells"]][:3] == [
        (600, 0),
        (600, 0.5),
        (600, 1),
    ]
    assert result["mean"] == 1 and result["haystack"] == "essays" and len(records) == 12
    assert result["cells"][0]["rate_interval"] == pytest.approx([0.342, 1], abs=1e-3)
    assert {r["task"] for r in records} == {"needle"}
    result, _ = cfg.needle.run(cfg, asked(noise()))
    assert result["mean"] == 0
    result, records = cfg.needle.run(cfg, asked(copier(sees=330)))
    by_depth = {d: [r["correct"] for r in records if r["depth"] == d] for d in OWN.depths}
    assert all(by_depth[1]) and not any(by_depth[0])


def test_what_cannot_be_hidden_is_named():
    with pytest.raises(
        UserError, match=r"lengths=270, depth 0.5, sample 3: one sentence makes \d+"
    ):
        hide(length=270, index=3)
    with pytest.raises(UserError, match=r"ask for 9000 tokens, but the longest document of hay"):
        hide(length=9000)
    dull = replace(HAY, documents=Memory([characters("no stop " * 200)]))
    with pytest.raises(UserError, match="hay: 800 tokens of it hold no whole sentence"):
        hide(hay=dull)


def test_a_foreign_tokenizer_is_refused(cfg):
    model = copier()
    model.config = SimpleNamespace(vocab_size=64)
    with pytest.raises(UserError, match=r"the model knows 64: it is the tokenizer of another"):
        cfg.needle.run(cfg, asked(model))


def test_text_is_whole_sentences_of_one_document(cfg):
    for seed in range(5):
        found = HAY.draw(400, Random(seed))
        assert " ".join(found) in TEXT or " ".join(found) in TEXT.upper()
    assert (
        HAY.draw(400, Random(0), 200)
        == HAY.draw(400, Random(0))[: len(HAY.draw(400, Random(0), 200))]
    )
    essays = haystack(cfg, asked(copier()), "essays")
    assert essays.documents.lengths.tolist() == [len(ESSAY)]
    assert np.array_equal(essays.documents.tokens(0, 3, 9), characters(ESSAY[3:9]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": [0, 1.5]}, "from 0 to 1"),
        ({"samples": 0}, "needle.samples=0"),
        ({"haystack": "grass"}, "'grass' is not one of held_out, essays"),
        ({"mode": "ask"}, "needle.mode='ask'"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(UserError, match=message):
        replace(OWN, **change)
