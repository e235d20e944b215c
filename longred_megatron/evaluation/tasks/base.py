"""What a task is: how its prompts are made, and how a model's answers are scored."""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from longred_megatron.errors import UserError
from longred_megatron.evaluation.haystacks import Haystack, Haystacks
from longred_megatron.evaluation.models import CausalModel
from longred_megatron.evaluation.tasks.grid import Grid
from longred_megatron.evaluation.texts import TextEncoder


@dataclass(frozen=True)
class Options:
    """What the user says of single tasks. num_keys: in a multi-key prompt; questions: a file of them; chat_template:
    whether a prompt that is written as text is a message in the tokenizer's template."""

    num_keys: int = 4
    questions: Path | None = None
    chat_template: bool = False


class NoRoomError(UserError):
    """No prompt of a task fits into any of the lengths."""


@dataclass(frozen=True)
class Prompt:
    """One question to a model, and what is right.

    task: its name. prompt_set, sample: counted from 0. length: in tokens, of the prompt and what the model adds
    to it, at most. depth: of what is asked for, 0 (start) to 1 (end); None where the task has none. tokens: from
    the encoder's start token to where the model goes on. expected: the right strings. answer: the one right
    continuation in tokens, where the task is scored by it, else empty.
    """

    task: str
    prompt_set: int
    length: int
    depth: float | None
    sample: int
    tokens: tuple[int, ...]
    expected: tuple[str, ...]
    answer: tuple[int, ...] = ()


@dataclass(frozen=True)
class Place:
    """All that one prompt is made from. See `Prompt`; rng: the prompt's own; haystack: its own stretch of text, with
    `length` tokens or more."""

    task: str
    prompt_set: int
    length: int
    depth: float | None
    sample: int
    encoder: TextEncoder
    haystack: Haystack
    rng: random.Random

    def prompt(self, tokens: Sequence[int], expected: Sequence[str], answer: Sequence[int] = ()) -> Prompt:
        """The prompt that stands here; arguments as in `Prompt`."""
        return Prompt(
            self.task,
            self.prompt_set,
            self.length,
            self.depth,
            self.sample,
            tuple(tokens),
            tuple(expected),
            tuple(answer),
        )


class Task(ABC):
    """A kind of prompt and its score, from 0 to 1. A task is a subclass of `Continuation` or of `Generation`.

    name: on the command line and in results.json; title: on the page; score_meaning: what a mean score is, to
    be read before "of prompts of 2,048 tokens"; rule: how an answer is scored, for people who repeat it; has_depths:
    whether `Place.depth` means something to it; group: a name for several tasks whose mean score is one figure.
    """

    name: ClassVar[str]
    group: ClassVar[str | None] = None
    has_depths: ClassVar[bool] = True
    title: str
    score_meaning: str
    rule: str

    def __init__(self, options: Options) -> None:
        self.options = options

    @classmethod
    def missing(cls, options: Options) -> str | None:
        """What the user has to give before its prompts can be made, None if nothing."""
        return None

    def problems(self) -> list[str]:
        """What is wrong with its options, one sentence each."""
        return []

    def facts(self) -> dict[str, int | str]:
        """What of its options decides its prompts, for results.json."""
        return {}

    def room_needed(self) -> str:
        """What a prompt holds beside filler, for messages."""
        return "the question"

    @abstractmethod
    def prompt(self, place: Place) -> Prompt | None:
        """The prompt at `place`, or None when its length leaves no room. Depends on `place` alone."""

    @abstractmethod
    def num_row_tokens(self, prompt: Prompt) -> int:
        """Tokens of the prompt and of what the model adds. Prompts that agree in it are scored in one batch."""

    @abstractmethod
    def scores(self, model: CausalModel, prompts: Sequence[Prompt]) -> list[float]:
        """The score of each prompt, from 0 to 1; `prompts` agree in `num_row_tokens`."""

    def prompts(self, encoder: TextEncoder, haystacks: Haystacks, grid: Grid) -> list[Prompt]:
        """All prompts of `grid`, a pure function of the arguments, by length. A length that has no room for one of
        them is left out; raises `NoRoomError` when none is left."""
        found: list[Prompt] = []
        for length in grid.lengths:
            of_length = [self.prompt(place) for place in self._places(encoder, haystacks, grid, length)]
            prompts = [prompt for prompt in of_length if prompt is not None]
            if len(prompts) == len(of_length):
                found += prompts
        if not found:
            raise NoRoomError(
                f"--lengths {' '.join(map(str, grid.lengths))}: none has room for {self.room_needed()} ({self.name}); "
                "give longer ones"
            )
        return found

    def _places(self, encoder: TextEncoder, haystacks: Haystacks, grid: Grid, length: int) -> list[Place]:
        number = grid.num_prompts_per_length
        order = list(range(number))  # so that a set and a depth are spread over all texts
        random.Random(f"{grid.seed}/{self.name}/{length}").shuffle(order)
        places = []
        for stretch, (prompt_set, depth, sample) in zip(order, grid.cells(self.has_depths), strict=True):
            rng = random.Random(f"{grid.seed}/{self.name}/{length}/{prompt_set}/{depth}/{sample}")
            haystack = haystacks.haystack(stretch, number, length, rng)
            places.append(Place(self.name, prompt_set, length, depth, sample, encoder, haystack, rng))
        return places


class Continuation(Task):
    """A task with one right continuation: scored 1 if greedy decoding gives it in full, else 0.

    Computed in one forward pass with the answer fed in. This is exact: greedy decoding gives the answer if
    and only if each answer token is the argmax after the prompt and the answer tokens before it, and those
    are the inputs here. At the first miss the two part, but then the answer is wrong either way. Logits are
    computed for the answers' positions alone.
    """

    score_meaning = "share answered in full"
    rule = "1 if greedy decoding continues `tokens` with all of `answer`, else 0"

    def num_row_tokens(self, prompt: Prompt) -> int:
        return len(prompt.tokens) + len(prompt.answer)

    @torch.inference_mode()
    def scores(self, model: CausalModel, prompts: Sequence[Prompt]) -> list[float]:
        tokens = torch.tensor([prompt.tokens + prompt.answer for prompt in prompts], device=model.device)
        last = max(len(prompt.answer) for prompt in prompts)
        greedy = torch.cat([logits.argmax(dim=-1) for logits in model.logit_chunks(tokens[:, :-1], last)])
        right = (greedy.view(len(prompts), last) == tokens[:, -last:]).cpu()
        return [float(row[-len(prompt.answer) :].all()) for row, prompt in zip(right, prompts, strict=True)]


class Generation(Task):
    """A task that reads what the model writes: at most `num_new_tokens` tokens by greedy decoding, until the
    end-of-text token."""

    num_new_tokens: int

    @abstractmethod
    def score(self, prompt: Prompt, text: str) -> float:
        """The score of the written `text`, from 0 to 1."""

    def num_row_tokens(self, prompt: Prompt) -> int:
        return len(prompt.tokens) + self.num_new_tokens

    def scores(self, model: CausalModel, prompts: Sequence[Prompt]) -> list[float]:
        tokens = torch.tensor([prompt.tokens for prompt in prompts], device=model.device)
        texts = model.continuations(tokens, self.num_new_tokens)
        return [self.score(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
