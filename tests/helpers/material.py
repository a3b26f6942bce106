"""RULER's files, small: essays, words, and questions whose answers only their documents hold."""

import json
from pathlib import Path

NOUNS = ["river", "stone", "cloud", "ladder", "window", "garden"]
ADJECTIVES = ["quiet", "green", "narrow", "old"]
VERBS = [f"verb{i}" for i in range(60)]
ESSAY = " ".join(f"Sentence {i} is about the thing called {i * i}." for i in range(400))


def write_material(folder: Path) -> Path:
    """All files of `ruler.data`; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "essays.json").write_text(json.dumps({"text": ESSAY}))
    for name, words in (("noun", NOUNS), ("adjective", ADJECTIVES), ("verb", VERBS)):
        (folder / f"{name}list.txt").write_text("\n".join(words))
    articles = [
        {
            "paragraphs": [
                {
                    "context": f"In article {a} paragraph {p} the code is {a}{p}7.",
                    "qas": [
                        {
                            "question": f"What is the code of article {a} paragraph {p}?",
                            "answers": [{"text": f"{a}{p}7"}, {"text": "never said"}],
                            "is_impossible": p == 2,
                        }
                    ],
                }
                for p in range(3)
            ]
        }
        for a in range(4)
    ]
    (folder / "squad.json").write_text(json.dumps({"data": articles}))
    hotpot = [
        {
            "question": f"Where does person {i} live?",
            "answer": f"Town {i}",
            "supporting_facts": [[f"Person {i}", 0], [f"Town {i}", 0]],
            "context": [[f"Other {i}{j}", [f"Nothing {j}."]] for j in range(3)]
            + [[f"Person {i}", ["They live in", " that town."]], [f"Town {i}", ["A town."]]],
        }
        for i in range(5)
    ]
    (folder / "hotpotqa.json").write_text(json.dumps(hotpot))
    return folder
