"""RULER's questions over documents: those that belong to a question among random others.

Scored by whether any of the accepted answers is in the reply. Costs what its text costs.
Source: RULER (2404.06654) section 3 and its code, package nvidia-long-context-eval 26.3.
"""

from dataclasses import dataclass
from random import Random

from longctx.eval.ask import Prompt
from longctx.eval.ruler_data import Asked, Exam

INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words."
)
QA = (
    f"{INSTRUCTION}\n\nThe following are given documents.\n\n{{context}}\n\n{INSTRUCTION}\n\n"
    "Question: {query}"
)
QA_START = " Answer:"
FIRST = 500  # questions of a file that NVIDIA asks


@dataclass(frozen=True)
class Documents:
    """Questions of one file; a unit is a document.

    Args:
        exam: questions and documents.
        seed: fixes which of the questions are asked first; NVIDIA's 500 come before all others.
    """

    exam: Exam
    seed: int

    @property
    def least(self) -> int:
        """The documents that answer; two for HotpotQA."""
        return max((asked.gold for asked in self.exam.questions[:FIRST]), default=1)

    @property
    def most(self) -> int:
        """All documents."""
        return len(self.exam.documents)

    def question(self, index: int) -> Asked:
        """Question number `index` of a shuffled order."""
        order = list(range(min(FIRST, len(self.exam.questions))))
        Random(f"ruler questions {self.seed}").shuffle(order)
        place = order[index] if index < len(order) else index
        return self.exam.questions[place % len(self.exam.questions)]

    def _documents(self, asked: Asked, size: int, draw: Random) -> list[int]:
        if size <= len(asked.own):  # below NVIDIA's ten: those that answer stand first
            return list(asked.own[:size])
        if size >= self.most:
            return list(range(self.most))
        more = size - len(asked.own)
        if more <= len(asked.near):
            return [*asked.own, *draw.sample(asked.near, more)]
        known = {*asked.own, *asked.near}
        others = [i for i in range(self.most) if i not in known]
        more -= len(asked.near)
        return [*asked.own, *asked.near, *draw.sample(others, min(more, len(others)))]

    def write(self, size: int, index: int, draw: Random) -> Prompt:
        """A prompt with `size` documents."""
        asked = self.question(index)
        places = self._documents(asked, size, draw)
        draw.shuffle(places)
        texts = [self.exam.documents[i] for i in places]
        context = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(texts, 1))
        gold = tuple(self.exam.documents[i] for i in asked.own[: asked.gold])
        text = QA.format(context=context, query=asked.text)
        return Prompt(text, QA_START, asked.answers, gold, {"documents": len(texts)})
