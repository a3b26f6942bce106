"""The template task: who is asked what, where the passage stands, what counts as following."""

import re
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from longctx.errors import UserError
from longctx.eval.tasks import template
from tests.helpers.fakes import Memory, characters
from tests.helpers.reading import subject

EOS, BOS = 2, 1
OWN = template.Template(["key", "repeat", "list"], [0, 3], 160, 6, 80)


class Clerk(nn.Module):
    """Knows every answer it can read; `manner` spoils the template. One token a character."""

    def __init__(self, manner: str = "", window: int = 2000, encoder: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.manner = manner
        self.config = SimpleNamespace(max_position_embeddings=window)
        self.read: list[tuple[str, list[str]]] = []
        if encoder:
            self.encode = lambda: None
            self.config.encoder_config = SimpleNamespace(max_position_embeddings=160)

    def generate(self, input_ids, context_ids=None, context_mask=None, **settings):
        assert settings["do_sample"] is False and input_ids[0, 0] == BOS
        prompt = "".join(map(chr, input_ids[0, 1:].tolist()))
        contexts = [] if context_ids is None else context_ids[0].tolist()
        contexts = ["".join(map(chr, ids)) for ids in contexts]
        self.read.append((prompt, contexts))
        question = re.search(r"Question: (.*)\n$", prompt)[1]
        text = f"Answer: {self.answer(question, prompt + ''.join(contexts))}\nDone."
        text = text.replace("Done.", "Done!") if self.manner == "sloppy" else text
        more = characters(text) + ([] if self.manner == "endless" else [EOS])
        return torch.cat([input_ids, torch.tensor([more])], dim=1)

    def answer(self, question, seen):
        if self.manner == "wrong":
            return "no"
        if "pass key" in question:
            name = question.removesuffix("?").split()[-1]
            found = re.search(rf"The pass key of {name} is (\d+)", seen)
            return found[1] if found else "unknown"
        if "Which name" in question:
            names = question.removesuffix("?").split(" one of ")[1].split(", ")
            return names[0 if " first " in question else -1]
        often, *then = question.removesuffix(".").split(", then ")
        return " ".join([often.split()[1]] * (3 if "three" in often else 2) + then)


@pytest.fixture
def ask(monkeypatch):
    text = np.array([ord("x")] * 4000)
    store = Memory([np.array([1, 5, 2]), text])
    store.path, store.meta = "held_out", {"digest": "d" * 64}
    monkeypatch.setattr(template, "open_store", lambda cfg: store)

    def run(model, own=OWN):
        asked = subject(model, BOS)
        asked.tokenizer.eos_token_id = EOS
        asked.decode = lambda ids: "".join(chr(i) for i in ids if i != EOS)
        return own.run(SimpleNamespace(seed=0), asked)

    return run


def cell(result, kind, count):
    [found] = [c for c in result["cells"] if (c["kind"], c["count"]) == (kind, count)]
    return found


@pytest.mark.parametrize("encoder", [False, True])
def test_who_reads_all_answers_all(ask, encoder):
    model = Clerk(encoder=encoder)
    result, records = ask(model)
    assert len(records) == 3 * 2 * 6 and result["truncated_prompts"] == 0
    for kind in ("all", *OWN.kinds):
        for count in OWN.counts:
            row = cell(result, kind, count)
            assert row["follows"] == row["right"] == 1.0
            assert row["prompts"] == (18 if kind == "all" else 6)
    assert result["contexts_read_by"] == ("encoder" if encoder else "decoder")
    alone, behind = model.read[:6], model.read[6:12]
    for (prompt, none), (question, contexts) in zip(alone, behind, strict=True):
        assert prompt.startswith("The pass key of") and none == []
        if encoder:  # the passage is in one of the contexts, which all have their full length
            assert question.startswith("Question: ") and prompt.endswith(question)
            assert [len(c) for c in contexts] == [160] * 3
            assert sum("The pass key of" in c for c in contexts) == 1
        else:
            assert contexts == [] and len(question) > 480
    told = [["The pass key" in c for c in contexts] for _, contexts in behind if contexts]
    places = [found.index(True) for found in told]
    assert places == ([0, 1, 2, 0, 1, 2] if encoder else [])


@pytest.mark.parametrize(
    ("manner", "follows", "right"),
    [("sloppy", 0.0, 0.0), ("endless", 0.0, 0.0), ("wrong", 1.0, 0.0)],
)
def test_what_does_not_count(ask, manner, follows, right):
    result, _ = ask(Clerk(manner))
    row = cell(result, "all", 0)
    assert (row["follows"], row["right"]) == (follows, right)
    assert row["follows_interval"][0] <= follows <= row["follows_interval"][1]


def test_the_same_instructions_with_every_number_of_contexts(ask):
    _, records = ask(Clerk())
    asked = {n: [r["question"] for r in records if r["count"] == n] for n in (0, 3)}
    assert asked[0] == asked[3] and len(set(asked[0])) > 12


@pytest.mark.parametrize(
    ("own", "model", "message"),
    [
        (OWN, Clerk(window=100), "key behind 0 contexts: .* exceed the window of 100"),
        (replace(OWN, size=20), Clerk(), "template.size=20: a passage has"),
        (replace(OWN, size=200), Clerk(encoder=True), "exceeds the encoder's window of 160"),
        (replace(OWN, size=4000), Clerk(), "has no document of 12,002 tokens"),
    ],
)
def test_what_does_not_fit_is_told(ask, own, model, message):
    with pytest.raises(UserError, match=message):
        ask(model, own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kinds": ["key", "song"]}, "template.kinds='song' is not one of key, repeat, list"),
        ({"kinds": []}, "must name at least one of"),
        ({"counts": [2, 2]}, "template.counts"),
        ({"questions": 0}, "template.questions=0 must be above 0"),
    ],
)
def test_settings_that_make_no_sense(change, message):
    with pytest.raises(UserError, match=message):
        replace(OWN, **change)


def test_the_table(ask):
    models = []
    for label, manner in (("good", ""), ("bad", "sloppy")):
        result, _ = ask(Clerk(manner))
        models.append(({"label": label}, result))
    lines = list(template.Template.section(models, Path()))
    rows = [line for line in lines if line.startswith("| good | decoder | all | follows")]
    assert len(rows) == 1 and rows[0].count("100.0 [") == 2
    assert any(line.startswith("| bad | decoder | key | right | 0.0 [0.0,") for line in lines)


def test_fillers_are_neighbours_inside_one_document():
    store = Memory([np.arange(40), np.arange(100, 160)])
    store.path = "s"
    for group in islice(template.fillers(store, 10, 3, 0), 30):
        flat = [token for piece in group for token in piece]
        assert len(flat) == 30 and np.array_equal(flat, np.arange(flat[0], flat[0] + 30))
        assert flat[0] not in (0, 100)  # not the BOS
