import re
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longred_megatron.evaluation.haystacks import Haystacks
from longred_megatron.evaluation.tasks.association import NAMES, RELATIONS, Nonliteral, NonliteralControl
from longred_megatron.evaluation.tasks.base import Options, Prompt
from longred_megatron.evaluation.tasks.grid import Grid, even_depths
from longred_megatron.evaluation.texts import encoder_of
from tests.evaluation.conftest import byte_tokenizer

ENCODER = encoder_of(byte_tokenizer())
# Words that carry no meaning of their own.
SMALL_WORDS = {
    "a",
    "an",
    "and",
    "as",
    "from",
    "has",
    "in",
    "is",
    "of",
    "one",
    "the",
    "those",
    "to",
    "was",
    "who",
    "with",
}


def prompts_of(task: Nonliteral, samples: int = 5) -> list[Prompt]:
    filler = ENCODER.encode("The boat was late. Nobody had seen it! " * 2000)
    return task.prompts(ENCODER, Haystacks(filler, ENCODER), Grid((600, 2000), even_depths(3), 1, samples, 0))


def parts_of(prompt: Prompt) -> tuple[str, str]:
    """The needle, and the question with the answer's beginning."""
    text = ENCODER.decode(list(prompt.tokens))
    context, question = text.split("\n\nQuestion: ")
    [needle] = re.findall(rf"[^.!?\n]*{prompt.expected[0]}[^.!?\n]*\.", context)
    assert text.count(prompt.expected[0]) == 1
    return needle, question


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower())) - SMALL_WORDS


def test_the_question_shares_no_word_with_the_needle() -> None:
    for prompt in prompts_of(Nonliteral(Options())):
        needle, question = parts_of(prompt)
        assert not words_of(needle) & words_of(question), (needle, question)


def test_the_control_shares_words() -> None:
    for prompt in prompts_of(NonliteralControl(Options())):
        needle, question = parts_of(prompt)
        assert words_of(question) - {"question", "answer"} <= words_of(needle)


@pytest.mark.parametrize("relation", RELATIONS)
def test_no_pair_shares_a_word_and_each_leads_to_one(relation: Any) -> None:
    for first, second in relation.pairs:
        assert not words_of(relation.stated + first) & words_of(relation.asked + second) - {"first", "second"}
    assert set(Counter(first for first, _ in relation.pairs).values()) == {1}
    assert set(Counter(second for _, second in relation.pairs).values()) == {1}


@pytest.mark.parametrize("kind", [Nonliteral, NonliteralControl])
def test_lengths_depths_and_scores(kind: type[Nonliteral]) -> None:
    task = kind(Options())
    prompts = prompts_of(task)
    assert prompts == prompts_of(kind(Options())) and len(prompts) == 30
    for prompt in prompts:
        assert prompt.length - 20 < len(prompt.tokens) + task.num_new_tokens <= prompt.length
    known = {first: second for relation in RELATIONS for first, second in relation.pairs}

    def oracle(tokens: Any, num_new_tokens: int) -> list[str]:
        answers = []
        for row in tokens.tolist():
            context, question = ENCODER.decode(row).split("\n\nQuestion: ")
            [name] = [name for name in NAMES if name in context]
            [first] = [first for first in known if first in context]
            assert first in question or known[first] in question
            answers.append(f" {name.upper()}.")
        return answers

    model: Any = SimpleNamespace(device=torch.device("cpu"), continuations=oracle)
    assert {task.scores(model, [prompt])[0] for prompt in prompts} == {1.0}
    model.continuations = lambda tokens, num_new_tokens: [NAMES[0]]
    scores = [task.scores(model, [prompt])[0] for prompt in prompts_of(task, samples=100)]
    chance = 1 / len(NAMES)
    assert sum(scores) / len(scores) == pytest.approx(chance, abs=4 * (chance / len(scores)) ** 0.5)
