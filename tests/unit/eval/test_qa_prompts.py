import json

import pytest

from longctx.errors import UserError
from longctx.eval.qa_prompts import Passage, Question, digest, rank, read

SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "The_Normans",
            "paragraphs": [
                {
                    "context": "Normandy is in France.",
                    "qas": [
                        {
                            "id": "q1",
                            "question": "Where is Normandy? ",
                            "answers": [
                                {"text": "France"},
                                {"text": "France"},
                                {"text": "in France"},
                            ],
                        },
                        {"id": "q2", "question": "Why?", "answers": [], "is_impossible": True},
                    ],
                },
                {"context": "Rollo was their leader.", "qas": []},
            ],
        }
    ],
}
HOTPOT = [
    {
        "_id": "h1",
        "question": "Were A and B of one land?",
        "answer": "yes",
        "supporting_facts": [["A", 0], ["B", 0], ["B", 1]],
        "context": [["C", ["C is a film.", " It is old."]], ["A", ["A is."]], ["B", ["B is."]]],
    },
    {
        "_id": "h2",
        "question": "What is C?",
        "answer": "film",
        "supporting_facts": [["C", 0]],
        "context": [["C", ["C is a film.", " It is old."]], ["D", ["D is."]]],
    },
]
RETRIEVED = [
    {
        "question": "Who leads?",
        "answers": ["Rollo"],
        "ctxs": [
            {"title": "X", "text": "Nobody.", "score": "0.5"},
            {"title": "Y", "text": "Rollo leads.", "score": 2.5},
            {"title": "X", "text": "Nobody.", "score": 0.1},
            {"title": "Z", "text": "Rolloing hills.", "score": 1.0},
        ],
    }
]


@pytest.fixture
def load(tmp_path):
    def write(content):
        path = tmp_path / "qa.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return read(str(path))

    return write


def test_squad(load):
    pool = load(SQUAD)
    assert pool.passages == [
        Passage("The Normans", "Normandy is in France."),
        Passage("The Normans", "Rollo was their leader."),
    ]
    assert pool.questions == [
        Question("q1", "Where is Normandy?", ("France", "in France"), gold=(0,))
    ]
    assert str(pool.passages[0]) == "Document (Title: The Normans): Normandy is in France."


def test_hotpot_shares_its_passages(load):
    pool = load(HOTPOT)
    assert [p.title for p in pool.passages] == ["C", "A", "B", "D"]
    assert pool.passages[0].text == "C is a film. It is old."
    assert [q.gold for q in pool.questions] == [(1, 2), (0,)]
    assert pool.questions[0].answers == ("yes",)


def test_retrieved_passages_with_scores(load):
    pool = load(RETRIEVED)
    [question] = pool.questions
    assert [p.title for p in pool.passages] == ["X", "Y", "Z"]
    assert question.gold == (1,) and question.given == (1, 2, 0)
    [ranked] = rank(pool, pool.questions, "given", 2)
    assert ranked.best == (1, 2) and ranked.others == (2, 0)


def test_without_scores_there_is_no_given_ranking(load):
    pool = load(HOTPOT)
    with pytest.raises(UserError, match="needs a score for each passage"):
        rank(pool, pool.questions, "given", 2)


def test_bm25_over_the_whole_pool_and_others_hold_no_answer(load):
    pool = load(HOTPOT)
    extra = pool.add("E", "What is C? A film is what C is.")
    ranked = rank(pool, pool.questions, "bm25", 3)[1]
    assert ranked.best[0] == extra and 0 in ranked.best
    assert not {0, extra} & set(ranked.others) and len(ranked.others) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable JSON"),
        ({"rows": []}, "its layout is none of SQuAD's"),
        ([], "its layout is none of"),
        ([{"question": "?"}], "its layout is none of .*'answers'"),
        ([{**RETRIEVED[0], "answers": []}], "layout"),
        ({"data": [{"title": "T", "paragraphs": [{"context": "C"}]}]}, "'qas'"),
        ({"data": []}, "no question with an answer"),
    ],
)
def test_other_files_are_refused(load, content, message):
    with pytest.raises(UserError, match=message) as caught:
        load(content)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"none.json: no such file \(bash data_prep/qa_data.sh"):
        digest(str(tmp_path / "none.json"))
