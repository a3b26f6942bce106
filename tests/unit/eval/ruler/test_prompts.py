"""Golden prompts: NVIDIA's words, spaces and misspelling, with numbers of one seed.

The texts were held against those of NVIDIA's generators (package nvidia-long-context-eval 26.3).
"""

import re
from collections import Counter
from random import Random

import pytest

from longctx.errors import UserError
from longctx.eval.ruler.material import ESSAYS, HOTPOT, SQUAD, Material, sentences
from longctx.eval.ruler.prompts import (
    NOISE,
    CommonWords,
    Documents,
    FrequentWords,
    Niah,
    Variables,
    variables,
)
from longctx.eval.tasks.ruler import frequent_words
from tests.helpers.material import ADJECTIVES, ESSAY, NOUNS, write_material

WORDS = [f"w{i:02}" for i in range(60)]


def niah(haystack, needles=1, per_key=1, asked=1, keys="words", values="numbers"):
    essay = ESSAY.split(" ")
    return Niah(haystack, keys, values, needles, per_key, asked, NOUNS, ADJECTIVES, essay)


def full(prompt):
    return prompt.text + prompt.start


def test_one_needle_in_noise():
    prompt = niah("repeat").write(2, 0, Random(5))
    [value], [needle] = prompt.answers, prompt.evidence
    key = re.fullmatch(r"One of the special magic numbers for (\S+) is: (\d{7})\.", needle)[1]
    assert key.split("-")[0] in ADJECTIVES and key.split("-")[1] in NOUNS
    assert full(prompt) == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I "
        "will quiz you about the number afterwards.\n"
        f"{NOISE}\n{needle}\n{NOISE}\n"
        f"What is the special magic number for {key} mentioned in the provided text? The special "
        f"magic number for {key} mentioned in the provided text is"
    )
    assert f"is: {value}." in needle


def test_four_keys_of_which_all_are_asked():
    prompt = niah("essay", 4, 1, 4).write(120, 0, Random(1))
    keys = re.findall(r"numbers for (\S+) is: ", prompt.text)
    asked = re.search(r"numbers for (\S+), (\S+), (\S+), and (\S+) mentioned in", prompt.text)
    assert sorted(keys) == sorted(asked.groups()) and len(prompt.answers) == 4
    for key, value in zip(asked.groups(), prompt.answers, strict=True):
        assert f"One of the special magic numbers for {key} is: {value}." in prompt.text
    assert prompt.text.startswith("Some special magic numbers are hidden within")
    assert prompt.start == " The special magic numbers for {}, {}, {}, and {} mentioned in the " \
        "provided text are".format(*asked.groups())  # fmt: skip


def test_the_essays_are_whole_and_needles_stand_between_sentences():
    prompt = niah("essay", 1, 4).write(100, 0, Random(2))
    context = prompt.text.split("\n")[1]
    bare = re.sub(r"One of the special magic numbers for \S+ is: \d+\.", "", context)
    assert bare.split() == ESSAY.split()[:100]
    for needle in prompt.evidence:
        before = context[: context.index(needle)].rstrip()
        assert before == "" or before.endswith(".")
    assert len(set(prompt.answers)) == 4 and len(set(re.findall(r"for (\S+) is:", context))) == 1


def test_a_needle_among_needles():
    prompt = niah("needle", keys="uuids", values="uuids").write(9, 0, Random(3))
    lines = prompt.text.split("\n")[1:-1]
    uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    needle = rf"One of the special magic uuids for {uuid} is: {uuid}\."
    assert len(lines) == 10 and all(re.fullmatch(needle, line) for line in lines)
    assert sum(prompt.answers[0] in line for line in lines) == 1
    assert prompt.text.startswith("A special magic uuid is hidden within")


def test_a_chain_of_variables():
    prompt = Variables(10).write(7, 0, Random(4))
    a, b, c, d, e = prompt.answers
    example, own = re.split(r"\n\n\n\n(?=Memorize)", full(prompt))
    value = re.search(r"assigned the value (\d{5}) in", own)[1]
    pairs = ((a, b), (b, c), (c, d), (d, e))
    chain = [f"VAR {a} = {value}", *(f"VAR {y} = VAR {x}" for x, y in pairs)]
    assert list(prompt.evidence) == chain
    bare = re.sub(r"VAR \w+ = (?:VAR \w+  |\d+ )", "", own)
    assert bare == (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        + "\n ".join([NOISE] * 7)
        + f"\n\nQuestion: Find all variables that are assigned the value {value} in the text above."
        " Answer: According to the chain(s) of variable assignment in the text above, 5 variables "
        f"are assgined the value {value}, they are: "
    )
    places = [own.index(line) for line in chain]
    assert places == sorted(places) and {len(n) for n in prompt.answers} == {5}
    assert example.startswith(" Memorize and track") and example.count(NOISE[:19]) == 10
    assert re.search(r", they are:  [A-Z]{3}( [A-Z]{3}){4}$", example)


def test_a_short_example_breaks_its_noise_into_sentences():
    text = Variables(5).write(7, 0, Random(4)).text.split("\n\n\n\n")[0]
    assert re.search(r"\. VAR [A-Z]{3} = ", text) and text.count(". \n") == 0


def test_the_example_has_room_in_500_tokens():
    def count(text):
        return len(text.split()) * 2

    made = variables(count, 30)
    shown = made.write(7, 0, Random(0)).text.split("\n\n\n\n")[0]
    assert 500 - 5 * 2 * 19 < count(shown) + 30 <= 500 and made.example_noise % 5 == 0


def test_common_words_behind_a_solved_list():
    prompt = CommonWords(WORDS, short=True).write(12, 0, Random(6))
    example, own = prompt.text.split("list?", 1)[0], prompt.text.rsplit("list?", 1)[0]
    own = own[own.rindex("Below is a numbered") :]
    head = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
    )
    assert example.startswith(head) and own.startswith(head)
    listed = re.findall(r"(\d+)\. (w\d\d)", own)
    assert [int(i) for i, _ in listed] == list(range(1, 10 * 6 + 2 + 1))
    counts = Counter(word for _, word in listed)
    assert {word for word, n in counts.items() if n == 6} == set(prompt.answers)
    assert len(prompt.answers) == 10 and sorted(counts.values())[:2] == [1, 1]
    start = " Answer: The top 10 words that appear most often in the list are:"
    middle = r"Question: What are the 10 most common words in the above list\?"
    assert prompt.start == start
    assert re.search(rf"{middle}{re.escape(start)}1\. w\d\d 2\. .* 10\. w\d\d\nBelow", prompt.text)
    long = CommonWords(WORDS, short=False).write(12, 0, Random(6))
    counts = Counter(re.findall(r"\. (w\d\d)", long.text.split("\nBelow")[1]))
    assert sorted(counts.values()) == [3, 3] + [30] * 10


def test_frequent_words():
    prompt = FrequentWords(40).write(500, 0, Random(7))
    assert re.fullmatch(
        r"Read the following coded text and track the frequency of each coded word\. Find the "
        r"three most frequently appeared coded words\. (?:(?:[a-z]{6}|\.\.\.) ?)+\nQuestion: Do "
        r"not provide any explanation\. Please ignore the dots '\.\.\.\.'\. What are the three "
        r"most frequently appeared words in the above coded text\?",
        prompt.text,
    )
    counts = Counter(re.findall(r" ([a-z]{6}|\.\.\.)(?=[ \n])", prompt.text.split("words.")[1]))
    ranked = [word for word, _ in counts.most_common(4)]
    assert ranked == ["...", *prompt.answers]
    assert [counts[w] for w in ranked] == [303, 75, 33, 18]  # 500 / (r^2 1.6449)
    assert FrequentWords.count(FrequentWords(40).least, 4) == 1
    with pytest.raises(UserError, match="fwe needs lengths of at least 250"):
        frequent_words(249)


# --- documents ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return Material(write_material(tmp_path_factory.mktemp("material")))


def test_questions_over_documents(material):
    source = Documents(material.squad, 0)
    prompt = source.write(3, 2, Random(8))
    ask = (
        "Answer the question based on the given documents. Only give me the answer and do not "
        "output any other words.\n\n"
    )
    head, rest = prompt.text.split("The following are given documents.\n\n")
    documents, end = rest.split(f"\n\n{ask}")
    assert head == ask and prompt.start == " Answer:"
    article, paragraph = re.fullmatch(
        r"Question: What is the code of article (\d) paragraph (\d)\?", end
    ).groups()
    parts = re.fullmatch(
        r"Document 1:\n(.*)\n\nDocument 2:\n(.*)\n\nDocument 3:\n(.*)", documents
    ).groups()
    assert {p.split(" paragraph")[0] for p in parts} == {f"In article {article}"}  # its own first
    assert prompt.answers == (f"{article}{paragraph}7", "never said")
    assert prompt.evidence == (
        f"In article {article} paragraph {paragraph} the code is {article}{paragraph}7.",
    )
    assert len(source.write(12, 2, Random(8)).text.split("Document ")) == 13
    asked = [source.question(i).text for i in range(8)]
    assert len(set(asked)) == 8 and not any("paragraph 2" in q for q in asked)
    assert [Documents(material.squad, 1).question(i).text for i in range(8)] != asked


def test_hotpotqa_keeps_what_answers_when_there_is_room_for_little(material):
    source = Documents(material.hotpotqa, 0)
    assert (source.least, source.most) == (2, 25)
    prompt = source.write(2, 0, Random(0))
    person = "Person " + re.search(r"Where does person (\d) live", prompt.text)[1]
    gold = {f"{person}\nThey live in that town.", f"Town {person[-1]}\nA town."}
    assert set(prompt.evidence) == gold and all(text in prompt.text for text in gold)
    assert prompt.text.count("Document ") == 2 and prompt.answers == (f"Town {person[-1]}",)
    whole = source.write(5, 0, Random(0))
    assert len(re.findall(r"Nothing \d", whole.text)) == 3
    assert source.write(9, 0, Random(0)).text.count("Document ") == 9


def test_missing_files_are_named(tmp_path):
    for name in (ESSAYS, SQUAD, HOTPOT):
        with pytest.raises(UserError, match=rf"has no {name} \(bash data_prep/ruler_data.sh"):
            Material(tmp_path).digest([name])
    (tmp_path / ESSAYS).write_text("{")
    with pytest.raises(UserError, match=r"essays.json: not readable JSON"):
        _ = Material(tmp_path).essays


def test_sentences():
    assert sentences(" A b. C?  D e!\nF. g") == ["A b.", "C?", "D e!", "F.", "g"]
