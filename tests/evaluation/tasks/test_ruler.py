"""RULER's tasks: every prompt is read and solved again by code that knows only its text."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from longred_megatron.errors import UserError
from longred_megatron.evaluation.haystacks import Haystacks
from longred_megatron.evaluation.tasks import chosen_tasks, make_prompts
from longred_megatron.evaluation.tasks.base import NoRoomError, Options, Prompt, Task
from longred_megatron.evaluation.tasks.grid import Grid, even_depths
from longred_megatron.evaluation.tasks.ruler import RULER_TASKS
from longred_megatron.evaluation.tasks.ruler.base import string_match_all, string_match_part
from longred_megatron.evaluation.tasks.ruler.common_words import CommonWords
from longred_megatron.evaluation.tasks.ruler.frequent_words import FrequentWords
from longred_megatron.evaluation.tasks.ruler.needles import NEEDLE_TASKS, NiahMultiquery, NiahSingle2
from longred_megatron.evaluation.tasks.ruler.variable_tracking import VariableTracking
from longred_megatron.evaluation.tasks.ruler.words import ENGLISH, draw_words
from longred_megatron.evaluation.texts import encoder_of
from tests.evaluation.conftest import byte_tokenizer

ENCODER = encoder_of(byte_tokenizer(bos=True))
SENTENCES = "The boat was late. Nobody had seen it! Where was it, then? "
LENGTHS = (8_000,)  # one token a byte: RULER's tasks need some thousands
HAYSTACKS = Haystacks(ENCODER.encode(SENTENCES * 1000), ENCODER)
NAMES = [task.name for task in RULER_TASKS]


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight questions on one document each, and four on two."""
    file = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    lines: list[dict[str, Any]] = []
    for number in range(8):
        said = f"Town number {number} was founded in {1700 + number} by the river."
        lines.append({"question": f"When was town {number} founded?", "answers": [f"{1700 + number}"], "context": said})
    for number in range(4):
        said = [f"Ann {number} wrote a book called Sea {number}.", f"The book Sea {number} won prize {number + 50}."]
        answers = [f"prize {number + 50}", f"the prize {number + 50}"]
        lines.append({"question": f"What did Ann {number}'s book win?", "answers": answers, "documents": said})
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return file


def task_of(name: str, questions: Path) -> Task:
    [task] = [each(Options(questions=questions)) for each in RULER_TASKS if each.name == name]
    assert task.problems() == []
    return task


def prompts_of(task: Task, lengths: tuple[int, ...] = LENGTHS, seed: int = 5, samples: int = 1) -> list[Prompt]:
    return task.prompts(ENCODER, HAYSTACKS, Grid(lengths, even_depths(3), 1, samples, seed))


def text_of(prompt: Prompt) -> str:
    return ENCODER.decode(list(prompt.tokens[1:]))


def solve_needles(text: str) -> list[str]:
    [asked] = re.findall(r"magic \w+ for (.+) mentioned in the provided text\?", text)
    values: dict[str, list[str]] = {}
    for key, value in re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", text):
        values.setdefault(key, []).append(value)
    return [value for key in re.split(r", and |, ", asked) for value in values[key]]


def solve_variables(text: str) -> list[str]:
    text = text.rpartition("Memorize and track")[2]
    [asked] = re.findall(r"assigned the value (\d+) in the text above", text)
    values: dict[str, str] = {}
    for name, given in re.findall(r"VAR (\w+) = (VAR \w+|\d+)", text):
        values[name] = values[given[4:]] if given.startswith("VAR") else given
    return [name for name, value in values.items() if value == asked]


def solve_common(text: str) -> list[str]:
    words = re.findall(r"\d+\. (\w+)", text.rpartition("Below is a numbered list")[2])
    ranked = Counter(words).most_common()
    assert ranked[9][1] > ranked[10][1]
    return [word for word, _ in ranked[:10]]


def solve_frequent(text: str) -> list[str]:
    coded = text.partition("coded words. ")[2].partition("\nQuestion:")[0]
    ranked = Counter(word for word in coded.split() if word != "...").most_common()
    assert ranked[2][1] > ranked[3][1]
    return [word for word, _ in ranked[:3]]


def solve_question(text: str) -> list[str]:
    documents = re.findall(r"Document \d+:\n(.+)", text)
    town = re.findall(r"Question: When was town (\d) founded\? Answer:$", text)
    if town:
        return [year for each in documents for year in re.findall(rf"Town number {town[0]} was founded in (\d+)", each)]
    [author] = re.findall(r"Question: What did (Ann \d)'s book win\? Answer:$", text)
    [book] = {title for each in documents for title in re.findall(rf"{author} wrote a book called (.+)\.", each)}
    return [prize for each in documents for prize in re.findall(rf"The book {book} won (.+)\.", each)]


SOLVERS: dict[str, Callable[[str], list[str]]] = {
    **{task.name: solve_needles for task in NEEDLE_TASKS},
    "vt": solve_variables,
    "cwe": solve_common,
    "fwe": solve_frequent,
    "qa_1": solve_question,
    "qa_2": solve_question,
}


def scores_of(task: Task, prompts: list[Prompt], answer: Callable[[str], str]) -> list[float]:
    """The scores of a model that answers a prompt's text."""

    def continuations(tokens: Tensor, num_new_tokens: int) -> list[str]:
        return [answer(ENCODER.decode(row[1:])) for row in tokens.tolist()]

    model: Any = SimpleNamespace(device=torch.device("cpu"), continuations=continuations)
    return [task.scores(model, [prompt])[0] for prompt in prompts]


def test_all_thirteen_are_there() -> None:
    assert len(set(NAMES)) == 13 and set(SOLVERS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_oracle_scores_one_and_a_constant_answer_none(name: str, questions: Path) -> None:
    """The oracle reads only the text, so every answer can be had from it, and it is the one expected."""
    task = task_of(name, questions)
    prompts = prompts_of(task)
    assert len(prompts) == 3
    for prompt in prompts:
        found = SOLVERS[name](text_of(prompt))
        assert set(found) & set(prompt.expected) if name.startswith("qa") else sorted(found) == sorted(prompt.expected)
    assert set(scores_of(task, prompts, lambda text: "\n".join(SOLVERS[name](text)).upper())) == {1.0}
    assert set(scores_of(task, prompts, lambda text: "0, zzz zzz and 0x1")) == {0.0}


@pytest.mark.parametrize("name", NAMES)
def test_prompts_fill_their_length_and_are_seeded(name: str, questions: Path) -> None:
    task: Any = task_of(name, questions)
    prompts = prompts_of(task)
    assert prompts == prompts_of(task_of(name, questions)) != prompts_of(task, seed=6)
    assert len({prompt.tokens for prompt in prompts}) == len(prompts)
    for prompt in prompts:
        assert prompt.tokens[0] == ENCODER.start[0]
        # The largest unit is a word of `cwe`, which is in the list 30 times with its number.
        assert prompt.length - 400 < len(prompt.tokens) + task.num_new_tokens <= prompt.length


@pytest.mark.parametrize(
    ("name", "num_needles", "num_expected"),
    [
        ("niah_single_1", 1, 1),
        ("niah_single_2", 1, 1),
        ("niah_single_3", 1, 1),
        ("niah_multikey_1", 4, 1),
        ("niah_multikey_2", None, 1),
        ("niah_multikey_3", None, 1),
        ("niah_multivalue", 4, 4),
        ("niah_multiquery", 4, 4),
    ],
)
def test_needles_are_as_many_as_published(
    name: str, num_needles: int | None, num_expected: int, questions: Path
) -> None:
    uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    kinds = {"niah_single_3": (r"[a-z]+-[a-z]+", uuid), "niah_multikey_3": (uuid, uuid)}
    key, value = kinds.get(name, (r"[a-z]+-[a-z]+", r"[1-9]\d{6}"))
    for prompt in prompts_of(task_of(name, questions)):
        text = text_of(prompt)
        found = re.findall(rf"One of the special magic (?:numbers|uuids) for {key} is: ({value})\.", text)
        assert len(found) == len(set(found)) == (num_needles or len(found)) and len(found) == text.count("One of the")
        assert num_needles or len(found) > 60
        assert len(prompt.expected) == num_expected and all(text.count(each) == 1 for each in prompt.expected)


@pytest.mark.parametrize("name", [task.name for task in NEEDLE_TASKS if task.has_depths])
def test_the_needle_asked_for_stands_at_its_depth(name: str, questions: Path) -> None:
    for prompt in prompts_of(task_of(name, questions)):
        text = text_of(prompt)
        start, end = text.index("afterwards.\n") + len("afterwards.\n"), text.rindex("\nWhat is the")
        needle = re.search(rf"One of the special magic \w+ for \S+ is: {prompt.expected[0]}\.", text)
        assert needle is not None and prompt.depth is not None
        place = (needle.start() - start) / (end - start - len(needle[0]))
        assert place == pytest.approx(prompt.depth, abs=0.06)


def test_tasks_with_several_answers_have_no_depth(questions: Path) -> None:
    for name in ("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1"):
        assert {prompt.depth for prompt in prompts_of(task_of(name, questions), LENGTHS)} == {None}


def test_the_wording_of_one_needle() -> None:
    """RULER's template, written out by hand."""
    task = NiahSingle2(Options())
    written = task._write(14, SENTENCES.split(), 0.5, random.Random(1))
    [value] = written.expected
    [key] = re.findall(r"magic numbers for (\S+) is", written.text)
    assert written.instruction == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\nThe boat was late. Nobody had seen it! "
        f"One of the special magic numbers for {key} is: {value}. Where was it, then? The boat\n"
        f"What is the special magic number for {key} mentioned in the provided text?"
    )
    assert written.answer_prefix == f" The special magic number for {key} mentioned in the provided text is"


def test_the_wording_of_several_needles() -> None:
    text = NiahMultiquery(Options())._write(8, SENTENCES.split(), None, random.Random(1)).text
    first, second, third, fourth = re.findall(r"magic numbers for (\S+) is: ", text)
    [asked] = re.findall(r"What are all the special magic numbers for (.+) mentioned in the provided text\?", text)
    assert sorted(re.split(", and |, ", asked)) == sorted([first, second, third, fourth])
    assert asked.count(", and ") == 1 and asked.count(", ") == 3
    assert text.startswith("Some special magic numbers are hidden within the following text. Make sure to memorize it.")
    assert text.endswith(f" The special magic numbers for {asked} mentioned in the provided text are")


def test_the_wording_of_variable_tracking() -> None:
    text = text_of(prompts_of(VariableTracking(Options()))[0])
    solved, asked = text.rsplit("\n\nMemorize", 1)
    [names] = re.findall(r"5 variables are assigned the value \d{5}, they are:  ([A-Z]{3}(?: [A-Z]{3}){4})$", solved)
    assert re.findall(r"VAR (\w+) = ", solved) == names.split()
    chain = re.findall(r"^VAR ([A-Z]{5}) = (?:VAR )?(\w+) ?$", asked, re.MULTILINE)
    assert [given for _, given in chain[1:]] == [name for name, _ in chain[:-1]] and len(chain) == 5
    assert asked.endswith(
        f"\nQuestion: Find all variables that are assigned the value {chain[0][1]} in the text above. Answer: "
        "According to the chain(s) of variable assignment in the text above, 5 variables are assigned the value "
        f"{chain[0][1]}, they are: "
    )


@pytest.mark.parametrize(
    ("length", "common", "others", "example", "example_common", "example_others"),
    [(3_500, 6, 1, 20, 3, 1), (9_000, 30, 3, 40, 10, 3)],
)
def test_how_often_words_are_in_the_lists(
    length: int, common: int, others: int, example: int, example_common: int, example_others: int
) -> None:
    """Other numbers below 4,096 tokens, as published."""
    for prompt in prompts_of(CommonWords(Options()), (length,)):
        _, first, second = text_of(prompt).split("Below is a numbered list")
        solution = first.partition("appear most often in the list are: ")[2]
        counts = Counter(re.findall(r"\d+\. (\w+)", first.partition("\nQuestion:")[0]))
        assert sorted(counts.values()) == [example_others] * (example - 10) + [example_common] * 10
        assert re.findall(r"\d+\. (\w+)", solution) == [word for word in counts if counts[word] == example_common] or (
            sorted(re.findall(r"\d+\. (\w+)", solution)) == sorted(w for w in counts if counts[w] == example_common)
        )
        asked = Counter(re.findall(r"\d+\. (\w+)", second))
        assert set(asked.values()) == {common, others}
        assert sorted(prompt.expected) == sorted(word for word in asked if asked[word] == common)


def test_frequencies_follow_zeta() -> None:
    """int(n * k^-2 / zeta(2)) for the k-th word, the dots first; a vocabulary of (length - 50) // 50 words."""
    for prompt in prompts_of(FrequentWords(Options()), (9_000,))[:1]:
        coded = text_of(prompt).partition("coded words. ")[2].partition("\nQuestion:")[0].split()
        counts = [count for _, count in Counter(coded).most_common()]
        assert any(_zeta_counts(num_words, 179) == counts for num_words in range(1, 5000)), counts


def _zeta_counts(num_words: int, size: int) -> list[int]:
    return [count for k in range(1, size + 1) if (count := int(num_words / (1.6449340668482264 * k**2)))]


def test_a_constant_answer_to_common_words_scores_what_chance_says() -> None:
    """Words are drawn evenly from the list, so ten fixed words hit as their share of it."""
    constant = " ".join(ENGLISH[::90][:10])
    chance = sum(word in constant for word in ENGLISH) / len(ENGLISH)
    task = CommonWords(Options())
    scores = scores_of(task, prompts_of(task, (3_500,), samples=40), lambda text: constant)
    assert sum(scores) / len(scores) == pytest.approx(chance, abs=4 * (chance / (10 * len(scores))) ** 0.5)


def test_matching() -> None:
    assert string_match_all("It is 12 and\tAB.", ["12", "ab", "7", "9"]) == 0.5
    assert string_match_all("", ["12"]) == 0.0
    assert string_match_part("in PARIS, I think", ["London", "Paris"]) == 1.0
    assert string_match_part("in Rome", ["London", "Paris"]) == 0.0


def test_words_differ_however_many() -> None:
    assert set(draw_words(len(ENGLISH), random.Random(0))) == set(ENGLISH)
    many = draw_words(20_000, random.Random(0))
    assert len(set(many)) == 20_000 and not set(many[:1000]) & set(ENGLISH)
    assert all(re.fullmatch(r"([bdfgklmnprstvz][aeiou]){3}", word) for word in many[:1000])


def test_documents_hold_those_of_the_question(questions: Path) -> None:
    for name in ("qa_1", "qa_2"):
        for prompt in prompts_of(task_of(name, questions)):
            text = text_of(prompt)
            numbers = [int(number) for number in re.findall(r"^Document (\d+):$", text, re.MULTILINE)]
            assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 50
            asked = (
                "Answer the question based on the given documents. Only give me the answer and do not output any "
                "other words."
            )
            assert text.startswith(f"{asked}\n\nThe following are given documents.\n\nDocument 1:\n")
            assert f"\n\n{asked}\n\nQuestion: " in text and text.endswith("? Answer:")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"question": "q", "answers": ["a"]}'], r"line 1 \(documents is missing"),
        (["{}", "[]", "nothing"], r"line 1 \(question is missing.*2 \(no JSON object.*3 \(no JSON: "),
        (['{"question": "q", "answers": [], "context": "c"}'], "answers is missing, empty"),
        (['{"question": "q", "answers": "a", "context": "c"}'], "answers is missing, empty or not text"),
        (['{"question": "q", "answers": ["a"], "context": "c"}'], "has not two questions on one document"),
        ([""], "holds no question"),
    ],
)
def test_bad_questions_are_told(lines: list[str], said: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    [task] = [each(Options(questions=file)) for each in RULER_TASKS if each.name == "qa_1"]
    [problem] = task.problems()
    assert re.search(said, problem), problem


def test_no_questions_and_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--tasks qa_2: needs questions"):
        chosen_tasks(["qa_2"], Options())
    with pytest.raises(UserError, match="cannot be read") as caught:
        chosen_tasks(["qa_1", "qa_2"], Options(questions=tmp_path / "none.jsonl"))
    assert len(caught.value.problems) == 1


def test_text_of_white_space_is_told() -> None:
    haystacks = Haystacks(ENCODER.encode(" \n" * 9000), ENCODER)
    with pytest.raises(UserError, match="white space alone"):
        NiahSingle2(Options()).prompts(ENCODER, haystacks, Grid((1000,), (0.5,), 1, 1, 0))


def test_the_group_is_all_that_can_be_made(questions: Path) -> None:
    tasks, notes = chosen_tasks(["ruler"], Options())
    assert [task.name for task in tasks] == NAMES[:-2]
    assert [note.partition(":")[0] for note in notes] == ["qa_1", "qa_2"]
    tasks, notes = chosen_tasks(["ruler", "qa_1"], Options(questions=questions))
    assert [task.name for task in tasks] == NAMES and notes == []


def test_tasks_of_the_group_without_room_are_left_out_and_told() -> None:
    tasks, _ = chosen_tasks(["ruler", "niah_single_1"], Options())
    grid = Grid((700,), (0.5,), 1, 1, 0)
    prompts, notes = make_prompts(tasks, ["ruler", "niah_single_1"], ENCODER, HAYSTACKS, grid)
    assert "niah_single_1" in {task.name for task in prompts}
    assert "cwe" not in {task.name for task in prompts} and any("(cwe)" in note for note in notes)
    with pytest.raises(NoRoomError, match=r"\(cwe\)"):
        make_prompts(tasks, ["ruler", "cwe"], ENCODER, HAYSTACKS, grid)
    with pytest.raises(NoRoomError, match=r"\(niah_single_1\)"):
        make_prompts(tasks, ["ruler"], ENCODER, HAYSTACKS, Grid((100,), (0.5,), 1, 1, 0))
