"""The two ways of scoring, against transformers' own greedy decoding; tasks of other shapes than retrieval."""

import dataclasses
import re

import pytest
import torch

from longred_megatron.errors import UserError
from longred_megatron.evaluation.haystacks import Haystacks
from longred_megatron.evaluation.models import CausalModel
from longred_megatron.evaluation.tasks import DEFAULT_TASKS, TASKS, chosen_tasks
from longred_megatron.evaluation.tasks.base import Generation, Options, Place, Prompt
from longred_megatron.evaluation.tasks.grid import Grid, doubling_lengths, even_depths
from longred_megatron.evaluation.tasks.passkey import Passkey
from longred_megatron.evaluation.tasks.results import measure_task
from longred_megatron.evaluation.texts import encoder_of
from tests.evaluation.conftest import byte_tokenizer

ENCODER = encoder_of(byte_tokenizer())
FILLER = ENCODER.encode("some lines of filler text\nand others " * 100)


class Letters(Generation):
    """A task without depths: the share of the expected letters that the model writes."""

    name = "letters"
    has_depths = False
    title = "Letters"
    score_meaning = "share of the letters"
    rule = "share of `expected` in the text"
    num_new_tokens = 5

    def prompt(self, place: Place) -> Prompt | None:
        # Every second prompt is a token shorter, as those of text tasks are.
        return place.prompt(place.haystack.take(place.length - 5 - place.sample % 2), ["a", "e"])

    def score(self, prompt: Prompt, text: str) -> float:
        return sum(letter in text for letter in prompt.expected) / len(prompt.expected)


def greedy(model: CausalModel, start: list[int], num_tokens: int) -> list[int]:
    """One token after the other, the whole text anew for each."""
    tokens = list(start)
    with torch.no_grad():
        for _ in range(num_tokens):
            tokens.append(int(model.network(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(start) :]


def test_answered_is_exactly_greedy_decoding(base: CausalModel) -> None:
    """The model's own greedy continuation counts as answered; with any one token changed it does not."""
    right = Prompt("", 0, 46, None, 0, tuple(FILLER[:40]), (), tuple(greedy(base, FILLER[:40], 6)))
    wrong = []
    for place in range(6):
        answer = list(right.answer)
        answer[place] = (answer[place] + 1) % 258
        wrong.append(dataclasses.replace(right, answer=tuple(answer)))
    # A shorter answer in the same batch: the model need not predict the filler before it.
    ending = tuple(greedy(base, FILLER[:44], 2))
    shorter = dataclasses.replace(right, tokens=tuple(FILLER[:44]), answer=ending)
    task = Passkey(Options())
    assert task.scores(base, [right, *wrong]) == [1.0] + [0.0] * 6
    assert task.scores(base, [wrong[0], shorter]) == [0.0, 1.0]


def test_written_text_is_greedy_decoding_up_to_the_end_of_text(base: CausalModel) -> None:
    rows = [FILLER[start : start + 40] for start in (0, 7, 14)]
    expected = []
    for row in rows:
        tokens = greedy(base, row, 30)
        expected.append(ENCODER.decode(tokens[: tokens.index(1)] if 1 in tokens else tokens))
    assert base.continuations(torch.tensor(rows), 30) == expected
    assert len(set(expected)) > 1


def test_a_task_without_depths_that_reads_what_is_written(base: CausalModel) -> None:
    grid = Grid((40, 60), even_depths(3), num_sets=2, num_samples=2, seed=0)
    task = Letters(Options())
    prompts = task.prompts(ENCODER, Haystacks(FILLER, ENCODER), grid)
    result = measure_task(base, task, prompts, tokens_per_batch=130)
    assert (result.lengths, result.depths) == ((40, 60), ())
    assert [(cell.depth, cell.num_samples, len(cell.sets)) for cell in result.cells] == [(None, 12, 2)] * 2
    of_length = sorted((p for p in prompts if p.length == 60), key=lambda p: (p.prompt_set, p.sample))
    texts = [ENCODER.decode(greedy(base, list(prompt.tokens), 5)) for prompt in of_length]
    expected = [("a" in text) / 2 + ("e" in text) / 2 for text in texts]
    assert result.cells[1].scores == tuple(expected)
    assert result.cells[1].sets == (sum(expected[:6]) / 6, sum(expected[6:]) / 6)
    assert result.accuracy_at(60) == pytest.approx(sum(expected) / 12)


def test_sets_share_nothing_that_is_drawn() -> None:
    grid = Grid((300,), (0.5,), num_sets=2, num_samples=3, seed=0)
    rest = "".join(chr(33 + i % 90) * 4 for i in range(900))  # no stretch twice
    prompts = Passkey(Options()).prompts(ENCODER, Haystacks(ENCODER.encode(rest), ENCODER), grid)
    starts = {ENCODER.decode(list(prompt.tokens[:60])) for prompt in prompts}
    assert len(starts) == 6
    assert len({prompt.expected for prompt in prompts}) > 3


def test_tasks_are_chosen_by_name() -> None:
    tasks, notes = chosen_tasks(["multi-key", "passkey", "passkey"], Options())
    assert [task.name for task in tasks] == [*DEFAULT_TASKS] and notes == []
    message = "--tasks paskey: no such task; did you mean passkey?"
    with pytest.raises(UserError, match=re.escape(message)):
        chosen_tasks(["paskey"], Options())
    with pytest.raises(UserError, match=rf"--tasks xyz: no such task; there are {', '.join(TASKS)}"):
        chosen_tasks(["xyz"], Options())


@pytest.mark.parametrize("task", TASKS.values())
def test_a_task_says_what_a_page_needs(task) -> None:
    made = task(Options())
    assert made.name and made.title and made.score_meaning and made.rule and made.room_needed()


def test_grids() -> None:
    assert doubling_lengths(512, 2048) == (128, 256, 512, 1024, 2048)
    assert doubling_lengths(512, 1500) == (128, 256, 512, 1024, 1500)
    assert even_depths(5) == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert even_depths(1) == (0.5,)
