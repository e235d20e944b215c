import dataclasses
import random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from longred_megatron.errors import UserError
from longred_megatron.evaluation import retrieval_text
from longred_megatron.evaluation.models import CausalModel
from longred_megatron.evaluation.retrieval import (
    Prompt,
    answered,
    build_prompt,
    build_prompts,
    doubling_lengths,
    even_depths,
    measure_retrieval,
)
from longred_megatron.evaluation.texts import encoder_of
from tests.evaluation.conftest import byte_tokenizer

ENCODER = encoder_of(byte_tokenizer())
FILLER = ENCODER.encode("some lines of filler text\nand others " * 100)
LENGTHS, DEPTHS = (192, 256), even_depths(5)


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


def prompts_of(num_keys: int, num_samples: int = 3, seed: int = 0) -> list[Prompt]:
    return build_prompts(ENCODER, FILLER, LENGTHS, DEPTHS, num_keys, num_samples, seed)


@pytest.mark.parametrize("num_keys", [1, 4])
def test_perfect_model_scores_one_and_random_model_zero(base: CausalModel, num_keys: int) -> None:
    prompts = prompts_of(num_keys)
    copier = CausalModel("copier", base.facts, Copier(), ENCODER, base.device, head_is_plain=False)
    perfect = measure_retrieval(copier, "task", num_keys, prompts, tokens_per_batch=600)
    chance = measure_retrieval(base, "task", num_keys, prompts, tokens_per_batch=600)
    assert [(cell.length, cell.depth) for cell in perfect.cells] == [(n, d) for n in LENGTHS for d in DEPTHS]
    assert all(cell.accuracy == 1.0 and cell.num_samples == 3 for cell in perfect.cells)
    assert chance.accuracy_at(192) == chance.accuracy_at(256) == 0.0


@pytest.mark.parametrize("num_keys", [1, 4])
def test_length_depth_and_answer_of_every_prompt(num_keys: int) -> None:
    for prompt in prompts_of(num_keys):
        assert len(prompt.tokens) == prompt.length
        text = ENCODER.decode(list(prompt.tokens))
        question, answer = text[: -prompt.num_answer_tokens], text[-prompt.num_answer_tokens :]
        assert answer == f" {prompt.value}"
        assert question.count(prompt.value) == 1
        assert question.count("The pass key of") == num_keys + 1
        word = question.rsplit("of ", 1)[1].removesuffix(" is")
        key = "\n" + retrieval_text.needle(word, prompt.value)
        assert text.index(key) == prompt.needle_start  # one token a byte: places in text and tokens agree
        assert question.endswith("\n" + retrieval_text.query(word))
        if num_keys == 1:
            num_filler = len(question) - len(key) - len("\n" + retrieval_text.query(word))
            assert prompt.needle_start == round(prompt.depth * num_filler)


def test_prompts_are_seeded_and_differ() -> None:
    assert prompts_of(4, seed=1) == prompts_of(4, seed=1) != prompts_of(4, seed=2)
    assert len({prompt.tokens for prompt in prompts_of(1)}) == len(prompts_of(1)) == 30


def test_start_token_opens_the_prompt() -> None:
    encoder = encoder_of(byte_tokenizer(bos=True))
    prompt = build_prompt(encoder, FILLER, 192, 0.0, 1, random.Random(0))
    assert prompt is not None
    assert (prompt.tokens[0], prompt.needle_start, len(prompt.tokens)) == (0, 1, 192)


def test_value_that_the_filler_holds_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = iter([[("river", "11111")], [("river", "22222")]])
    monkeypatch.setattr(retrieval_text, "draw_keys", lambda num_keys, rng: next(pairs))
    prompt = build_prompt(ENCODER, ENCODER.encode(" 11111 " * 100), 192, 0.5, 1, random.Random(0))
    assert prompt is not None and prompt.value == "22222"


def test_answered_is_exactly_greedy_decoding(base: CausalModel) -> None:
    """The model's own greedy continuation counts as answered; with any one token changed it does not."""
    start = FILLER[:40]
    with torch.no_grad():
        greedy = base.network.generate(torch.tensor([start]), max_new_tokens=6, min_new_tokens=6, do_sample=False)  # type: ignore[operator]
    right = Prompt(tuple(greedy[0].tolist()), 6, 0, "", 46, 0.0)
    wrong = []
    for place in range(40, 46):
        tokens = list(right.tokens)
        tokens[place] = (tokens[place] + 1) % 258
        wrong.append(dataclasses.replace(right, tokens=tuple(tokens)))
    # A shorter answer in the same batch: the model need not predict the filler before it.
    with torch.no_grad():
        ending = base.network.generate(torch.tensor([FILLER[:44]]), max_new_tokens=2, do_sample=False)  # type: ignore[operator]
    shorter = Prompt(tuple(ending[0].tolist()), 2, 0, "", 46, 0.0)
    assert answered(base, [right, *wrong]) == [True] + [False] * 6
    assert answered(base, [wrong[0], shorter]) == [False, True]


def test_lengths_with_no_room_are_left_out_or_refused() -> None:
    lengths = {prompt.length for prompt in build_prompts(ENCODER, FILLER, (32, 192), (0.5,), 4, 1, 0)}
    assert lengths == {192}
    with pytest.raises(UserError, match="--lengths 16 32: none has room for 4 keys"):
        build_prompts(ENCODER, FILLER, (16, 32), (0.5,), 4, 1, 0)
    with pytest.raises(UserError, match="tokens of filler, the texts give 50"):
        build_prompts(ENCODER, FILLER[:50], (192,), (0.5,), 1, 1, 0)


def test_grids() -> None:
    assert doubling_lengths(512, 2048) == (128, 256, 512, 1024, 2048)
    assert doubling_lengths(512, 1500) == (128, 256, 512, 1024, 1500)
    assert even_depths(5) == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert even_depths(1) == (0.5,)
