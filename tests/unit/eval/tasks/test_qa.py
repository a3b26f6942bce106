import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from longctx.errors import UserError
from longctx.eval.qa_prompts import Passage, Pool, Question, Ranked, Writer
from longctx.eval.tasks.qa import Cell, Qa, cells, choose, passages_of
from tests.helpers.fakes import characters
from tests.helpers.reading import Pupil, subject

ALL = ["retrieved", "first", "middle", "last", "gold_only", "no_gold"]
OWN = Qa(None, "bm25", [2, 4], ALL, 2, 1, 6, 12, None)
POOL = Pool([Passage(f"T{i}", f"text {i}") for i in range(8)])
QUESTION = Question("q", "Which?", ("nine",), gold=(5,))
RANKED = Ranked(best=(1, 5, 2, 3), others=(1, 2, 3, 4))


def writer(in_decoder=None, bos=None, demonstrations=()):
    return Writer(POOL, demonstrations, in_decoder, characters, bos)


def test_the_prompt():
    shown = [Question("d", "What?", ("seven", "7"), gold=(6,))]
    prompt = writer(None, 2, shown).write(QUESTION, (1, 5))
    want = (
        "Document (Title: T6): text 6\n\n"
        "Question: What?\nAnswer: seven\n\n"
        "Document (Title: T1): text 1\n\n"
        "Document (Title: T5): text 5\n\n"
        "Question: Which?\nAnswer:"
    )
    assert prompt.text == want
    assert prompt.tokens == [2, *characters(want)] and prompt.contexts == []
    [(start, stop)] = prompt.gold_spans
    assert want[start:stop] == "Document (Title: T5): text 5"


def test_the_decoder_reads_the_first_passages_and_the_encoder_the_rest():
    prompt = writer(2).write(QUESTION, (1, 2, 5, 3))
    assert prompt.text.count("Document") == 2 and prompt.gold_spans == []
    assert prompt.contexts == [characters(f"Document (Title: T{i}): text {i}") for i in (5, 3)]
    few = writer(2).write(QUESTION, (5,))
    assert few.contexts == [] and few.in_decoder == 1
    none = writer(0).write(QUESTION, (5,))
    assert none.text == "Question: Which?\nAnswer:" and len(none.contexts) == 1


@pytest.mark.parametrize(
    ("setting", "k", "want"),
    [
        ("retrieved", 3, (1, 5, 2)),
        ("first", 4, (5, 1, 2, 3)),
        ("middle", 4, (1, 5, 2, 3)),
        ("middle", 3, (1, 5, 2)),
        ("last", 4, (1, 2, 3, 5)),
        ("last", 1, (5,)),
        ("gold_only", None, (5,)),
        ("no_gold", 4, (1, 2, 3, 4)),
    ],
)
def test_which_passages(setting, k, want):
    assert passages_of(Cell(setting, k), QUESTION, RANKED) == want


def test_two_gold_passages_stay_together():
    two = replace(QUESTION, gold=(5, 7))
    assert passages_of(Cell("middle", 4), two, RANKED) == (1, 5, 7, 2)
    assert passages_of(Cell("gold_only", None), two, RANKED) == (5, 7)
    with pytest.raises(UserError, match=r"2 gold passages, and qa.passages=1 holds no more"):
        passages_of(Cell("last", 1), two, RANKED)


def test_too_few_passages_are_told():
    with pytest.raises(UserError, match=r"has 4 passages to choose from in .*no_gold.* needs 5"):
        passages_of(Cell("no_gold", 5), QUESTION, RANKED)


def test_gold_only_is_asked_once():
    made = cells(OWN)
    assert len(made) == 5 * 2 + 1 and made.count(Cell("gold_only", None)) == 1


def test_demonstrations_share_nothing_with_questions():
    questions = [Question(str(i), "?", ("x",), gold=(i // 2,)) for i in range(10)]
    pool = Pool(POOL.passages, questions)
    shown, asked = choose(pool, replace(OWN, questions=None), 3)
    assert len(shown) == 1 and len(asked) == 8
    assert shown[0].gold not in {q.gold for q in asked}
    assert choose(pool, OWN, 3) == (shown, asked[:6])
    assert choose(pool, OWN, 4) != (shown, asked[:6])
    lost = Pool(POOL.passages, [replace(q, gold=()) for q in questions[2:]] + questions[:1])
    only = replace(OWN, settings=["retrieved"], questions=None)
    assert len(choose(lost, only, 0)[1]) == 8  # without gold they can still be asked
    with pytest.raises(UserError, match="too few questions"):
        choose(lost, OWN, 0)


# --- the whole task -------------------------------------------------------------------------------

NAMES = ["Arn", "Bel", "Cas", "Dor", "Eld", "Fen", "Gil", "Hal"]


@pytest.fixture
def cfg(tmp_path):
    """Eight secrets in HotpotQA's layout; every passage is about one name."""

    def fact(name):
        return [name, [f"In this place the code of {name} is {100 + NAMES.index(name)}."]]

    data = [
        {
            "_id": name,
            "question": f"What is the code of {name}?",
            "answer": str(100 + NAMES.index(name)),
            "supporting_facts": [[name, 0]],
            "context": [fact(name)],
        }
        for name in NAMES
    ]
    path = tmp_path / "qa.json"
    path.write_text(json.dumps(data))
    return SimpleNamespace(qa=replace(OWN, data=str(path)), seed=0)


def cell(result, setting, k):
    [found] = [r for r in result["cells"] if (r["setting"], r["k"]) == (setting, k)]
    return found


def test_a_model_that_looks_answers_up(cfg):
    result, records = cfg.qa.run(cfg, subject(Pupil(2000), bos=65))
    assert len(records) == 6 * 11 and result["truncated_prompts"] == 0
    for setting, k in (("retrieved", 2), ("first", 4), ("middle", 4), ("last", 4)):
        row = cell(result, setting, k)
        assert (row["em"], row["f1"], row["gold_found"]) == (1, 1, 1)
        assert row["em_interval"] == pytest.approx([0.6097, 1], abs=1e-4)  # 6 of 6
    assert cell(result, "gold_only", None)["em"] == 1
    none = cell(result, "no_gold", 4)
    assert (none["em"], none["sub_em"], none["f1"], none["gold_found"]) == (0, 0, 0, 0)
    assert {r["prediction"] for r in records if r["setting"] == "no_gold"} == {"unknown"}
    assert all(r["prompt"][slice(*span)].startswith("Document (Title: " + r["id"])
               for r in records if r["prompt"] for span in r["gold_spans"])  # fmt: skip
    assert sum(r["prompt"] is not None for r in records) == 11
    assert result["contexts_read_by"] == "decoder" and result["decoder_passages"] is None


def test_an_encoder_reads_what_the_decoder_does_not(cfg):
    model = Pupil(2000, 100)
    result, records = cfg.qa.run(cfg, subject(model))
    for setting in ("first", "middle", "last"):
        assert cell(result, setting, 4)["em"] == 1
    assert cell(result, "last", 4)["in_decoder"] == [2, 2]
    assert (
        cell(result, "last", 4)["context_tokens"][0]
        > 0
        == cell(result, "last", 2)["context_tokens"][1]
    )
    last = [r for r in records if (r["setting"], r["k"]) == ("last", 4)]
    assert all(r["gold_spans"] == [] for r in last)  # the encoder has it
    assert all(r["gold_spans"] for r in records if r["setting"] == "first")
    assert {len(contexts) for _, contexts in model.calls} == {0, 2}
    blind, _ = cfg.qa.run(cfg, subject(Pupil(2000)))
    assert cell(blind, "last", 4)["em"] == 1 and cell(blind, "last", 4)["context_tokens"] == [0, 0]


def test_a_prompt_that_does_not_fit_is_named_before_anything_is_asked(cfg):
    model = Pupil(2000)
    _, records = cfg.qa.run(cfg, subject(model))
    widest = max(r["tokens"] for r in records)
    model.calls.clear()
    cfg.qa = replace(cfg.qa, window=widest + 12)
    cfg.qa.run(cfg, subject(model))
    model.calls.clear()
    cfg.qa = replace(cfg.qa, window=widest + 11)
    message = (
        rf"question \w+, \w+ with 4 passages: its prompt of {widest} tokens and 12 for the answer"
    )
    with pytest.raises(UserError, match=message):
        cfg.qa.run(cfg, subject(model))
    assert model.calls == []
    with pytest.raises(UserError, match="exceed the window of 50"):
        replace(cfg.qa, window=None).run(cfg, subject(Pupil(50)))


def test_a_passage_wider_than_the_encoder_is_several_contexts(cfg):
    model, whole = Pupil(2000, 20), Pupil(2000, 100)
    result, _ = cfg.qa.run(cfg, subject(model))
    uncut, _ = cfg.qa.run(cfg, subject(whole))
    for (_, pieces), (_, passages) in zip(model.calls, whole.calls, strict=True):
        assert max(map(len, pieces), default=0) <= 20 and "".join(pieces) == "".join(passages)
        assert len(pieces) == sum(-(-len(p) // 20) for p in passages)
    assert cell(result, "last", 4)["passages_cut"] == 6 * 2
    assert cell(result, "last", 2)["passages_cut"] == 0 == cell(uncut, "last", 4)["passages_cut"]
    assert cell(result, "last", 4)["context_tokens"] == cell(uncut, "last", 4)["context_tokens"]


def test_another_seed_asks_other_questions(cfg):
    asked = []
    for seed in (0, 0, 1):
        cfg.seed = seed
        asked.append([r["id"] for r in cfg.qa.run(cfg, subject(Pupil(2000)))[1]])
    assert asked[0] == asked[1] != asked[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": []}, "must name at least one"),
        ({"settings": ["gold"]}, "'gold' is not one of retrieved"),
        ({"ranking": "dense"}, "'dense' is not one of bm25, given"),
        ({"passages": [0]}, r"qa.passages=\[0\]"),
        ({"demonstrations": -1}, "qa.demonstrations=-1"),
        ({"new_tokens": 0}, "qa.new_tokens=0"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(UserError, match=message):
        replace(OWN, **change)
