from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from longred_megatron.errors import UserError
from longred_megatron.evaluation import retrieval_text
from longred_megatron.evaluation.haystacks import Haystacks
from longred_megatron.evaluation.models import CausalModel
from longred_megatron.evaluation.tasks import chosen_tasks
from longred_megatron.evaluation.tasks.base import Options, Prompt, Task
from longred_megatron.evaluation.tasks.grid import Grid, even_depths
from longred_megatron.evaluation.tasks.results import measure_task
from longred_megatron.evaluation.texts import encoder_of
from tests.evaluation.conftest import byte_tokenizer

ENCODER = encoder_of(byte_tokenizer())
FILLER = ENCODER.encode("some lines of filler text\nand others " * 500)
HAYSTACKS = Haystacks(FILLER, ENCODER)
LENGTHS, DEPTHS = (192, 256), even_depths(5)
NAMES = ("passkey", "multi-key")


class Copier(nn.Module):
    """Predicts what followed the longest earlier match of the text so far, as induction heads do."""

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.stack([self._row(row) for row in input_ids]))

    def _row(self, row: Tensor) -> Tensor:
        logits = torch.zeros(len(row), 258)
        matched = torch.zeros(
            len(row), dtype=torch.long
        )  # [j]: length of the common end of row[: t + 1] and row[: j + 1]
        for t in range(len(row)):
            matched = torch.where(row == row[t], torch.cat([torch.zeros(1, dtype=torch.long), matched[:-1]]) + 1, 0)
            if t:
                logits[t, row[matched[:t].argmax() + 1]] = 1.0
        return logits


def task_of(name: str, num_keys: int = 4) -> Task:
    [task], _ = chosen_tasks([name], Options(num_keys=num_keys))
    return task


def grid_of(lengths: Sequence[int] = LENGTHS, depths: Sequence[float] = DEPTHS, num_samples: int = 2, seed: int = 0):
    return Grid(tuple(lengths), tuple(depths), num_sets=2, num_samples=num_samples, seed=seed)


def prompts_of(name: str, **changes) -> list[Prompt]:
    return task_of(name).prompts(ENCODER, HAYSTACKS, grid_of(**changes))


@pytest.mark.parametrize("name", NAMES)
def test_perfect_model_scores_one_and_random_model_zero(base: CausalModel, name: str) -> None:
    copier = CausalModel("copier", base.facts, Copier(), ENCODER, base.device, head_is_plain=False)
    perfect = measure_task(copier, task_of(name), prompts_of(name), tokens_per_batch=600)
    chance = measure_task(base, task_of(name), prompts_of(name), tokens_per_batch=600)
    assert [(cell.length, cell.depth) for cell in perfect.cells] == [(n, d) for n in LENGTHS for d in DEPTHS]
    assert all(cell.accuracy == 1.0 and cell.num_samples == 4 for cell in perfect.cells)
    assert chance.accuracy_at(192) == chance.accuracy_at(256) == 0.0


@pytest.mark.parametrize(("name", "num_keys"), [("passkey", 1), ("multi-key", 4)])
def test_length_depth_and_answer_of_every_prompt(name: str, num_keys: int) -> None:
    prompts = prompts_of(name)
    assert len(prompts) == 2 * 5 * 2 * 2
    for prompt in prompts:
        assert len(prompt.tokens) + len(prompt.answer) == prompt.length
        question, [value] = ENCODER.decode(list(prompt.tokens)), prompt.expected
        assert ENCODER.decode(list(prompt.answer)) == f" {value}"
        assert question.count(value) == 1
        assert question.count("The pass key of") == num_keys + 1
        word = question.rsplit("of ", 1)[1].removesuffix(" is")
        key = "\n" + retrieval_text.needle(word, value)
        assert key in question
        assert question.endswith("\n" + retrieval_text.query(word))
        if num_keys == 1:
            num_filler = len(question) - len(key) - len("\n" + retrieval_text.query(word))
            assert prompt.depth is not None
            # One token a byte: places in text and tokens agree.
            assert question.index(key) == round(prompt.depth * num_filler)


def test_prompts_are_seeded_and_differ() -> None:
    assert prompts_of("multi-key", seed=1) == prompts_of("multi-key", seed=1) != prompts_of("multi-key", seed=2)
    assert len({prompt.tokens for prompt in prompts_of("passkey")}) == 40


def test_start_token_opens_the_prompt() -> None:
    encoder = encoder_of(byte_tokenizer(bos=True))
    [prompt, _] = task_of("passkey").prompts(encoder, HAYSTACKS, grid_of((192,), (0.0,), 1))
    assert (prompt.tokens[0], len(prompt.tokens) + len(prompt.answer)) == (0, 192)
    assert ENCODER.decode(list(prompt.tokens[1:])).startswith("\nThe pass key")


def test_value_that_the_filler_holds_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = iter([[("river", "11111")], [("river", "22222")], [("river", "22222")]])
    monkeypatch.setattr(retrieval_text, "draw_keys", lambda num_keys, rng: next(pairs))
    haystacks = Haystacks(ENCODER.encode(" 11111 " * 100), ENCODER)
    first, _ = task_of("passkey").prompts(ENCODER, haystacks, grid_of((192,), (0.5,), 1))
    assert first.expected == ("22222",)


def test_a_text_with_every_word_in_it_gives_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval_text, "WORDS", ("some", "lines", "filler"))
    assert len(prompts_of("passkey")) == 40


def test_lengths_with_no_room_are_left_out_or_refused() -> None:
    assert {prompt.length for prompt in prompts_of("multi-key", lengths=(32, 192))} == {192}
    with pytest.raises(UserError, match=r"--lengths 16 32: none has room for 4 keys and the question \(multi-key\)"):
        prompts_of("multi-key", lengths=(16, 32))
    with pytest.raises(UserError, match="tokens of filler, the texts give 50"):
        task_of("passkey").prompts(ENCODER, Haystacks(FILLER[:50], ENCODER), grid_of())
