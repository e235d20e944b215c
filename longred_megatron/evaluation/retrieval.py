"""Pass-key retrieval by length and depth: one key (`passkey`), or several and one asked for (`multi-key`)."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from longred_megatron.errors import UserError
from longred_megatron.evaluation import retrieval_text
from longred_megatron.evaluation.models import CausalModel
from longred_megatron.evaluation.texts import TextEncoder

# Filler is drawn from a stream this many times as long as the longest prompt, so that samples differ.
FILLER_WINDOWS = 8


@dataclass(frozen=True)
class Prompt:
    """One sequence: filler with keys in it, the question, and the right answer at its end.

    tokens: all of it, exactly `length` tokens; num_answer_tokens: how many at the end are the answer;
    needle_start: where the key that is asked for begins; value: the answer as text.
    """

    tokens: tuple[int, ...]
    num_answer_tokens: int
    needle_start: int
    value: str
    length: int
    depth: float


@dataclass(frozen=True)
class Cell:
    """accuracy: the share of `num_samples` prompts of `length` tokens, key at `depth` (0 = start, 1 = end),
    answered in full."""

    length: int
    depth: float
    num_samples: int
    accuracy: float


@dataclass(frozen=True)
class Retrieval:
    """All cells of one task. lengths, depths: in order; every pair has one cell."""

    task: str
    num_keys: int
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    cells: tuple[Cell, ...]

    def accuracy_at(self, length: int) -> float:
        """Mean accuracy over depths at one length."""
        cells = [cell.accuracy for cell in self.cells if cell.length == length]
        return sum(cells) / len(cells)


def even_depths(num_depths: int) -> tuple[float, ...]:
    """Depths from 0 (start) to 1 (end), evenly spaced; a single one is the middle."""
    return (0.5,) if num_depths == 1 else tuple(index / (num_depths - 1) for index in range(num_depths))


def doubling_lengths(original_window: int, extended_window: int) -> tuple[int, ...]:
    """A quarter of the original window, doubled up to the extended one, which is always the last: 512 and
    2048 give 128 ... 2048."""
    lengths = []
    length = max(original_window // 4, 1)
    while length < extended_window:
        lengths.append(length)
        length *= 2
    return (*lengths, extended_window)


def build_prompt(
    encoder: TextEncoder, filler: Sequence[int], length: int, depth: float, num_keys: int, rng: random.Random
) -> Prompt | None:
    """One prompt of exactly `length` tokens, answer included, or None when keys and question leave no room
    for filler.

    The filler is a random stretch of the token stream `filler`. The key asked for stands after round(depth *
    filler tokens) of it, the other keys at random places. The value asked for is in the prompt once: one that
    the filler or another key holds is drawn again.
    """
    pairs = retrieval_text.draw_keys(num_keys, rng)
    # Keys and question open a line of their own wherever the filler is cut, so each brings the newline before
    # it.
    keys = [encoder.encode("\n" + retrieval_text.needle(word, value)) for word, value in pairs]
    word, value = pairs[0]
    question, answer = _question_and_answer(encoder, word, value)
    num_filler = length - len(encoder.start) - sum(map(len, keys)) - len(question) - len(answer)
    if num_filler < 0:
        return None
    if num_filler > len(filler):
        raise UserError(
            f"texts too short: a prompt of {length} tokens needs {num_filler} tokens of filler, "
            f"the texts give {len(filler)}; "
            "give more text (--text, --long-text) or smaller --lengths"
        )
    start = rng.randrange(len(filler) - num_filler + 1)
    stretch = list(filler[start : start + num_filler])
    if value in encoder.decode(stretch):
        return build_prompt(encoder, filler, length, depth, num_keys, rng)

    places = [round(depth * num_filler), *(rng.randint(0, num_filler) for _ in pairs[1:])]
    tokens = list(encoder.start)
    needle_start, taken = 0, 0
    for place, index in sorted(zip(places, range(num_keys), strict=True)):
        tokens += stretch[taken:place]
        taken = place
        if index == 0:
            needle_start = len(tokens)
        tokens += keys[index]
    tokens += [*stretch[taken:], *question, *answer]
    return Prompt(tuple(tokens), len(answer), needle_start, value, length, depth)


def _question_and_answer(encoder: TextEncoder, word: str, value: str) -> tuple[list[int], list[int]]:
    """Tokens of the question and of its answer, tokenised together and parted where the question alone begins
    to differ.

    So a tokenizer that joins the end of the question with the answer's start is asked to complete its own
    tokens.
    """
    asked = "\n" + retrieval_text.query(word)
    alone, together = encoder.encode(asked), encoder.encode(asked + retrieval_text.answer(value))
    common = 0
    while common < min(len(alone), len(together)) and alone[common] == together[common]:
        common += 1
    return together[:common], together[common:]


def build_prompts(
    encoder: TextEncoder,
    filler: Sequence[int],
    lengths: Sequence[int],
    depths: Sequence[float],
    num_keys: int,
    num_samples: int,
    seed: int,
) -> list[Prompt]:
    """`num_samples` prompts for every length and depth, a pure function of the arguments. Lengths too short
    for the keys are left out."""
    prompts = []
    for length in lengths:
        drawn = [
            build_prompt(
                encoder,
                filler,
                length,
                depth,
                num_keys,
                random.Random(f"{seed}/{num_keys}/{length}/{depth}/{sample}"),
            )
            for depth in depths
            for sample in range(num_samples)
        ]
        of_length = [prompt for prompt in drawn if prompt is not None]
        if len(of_length) == len(drawn):
            prompts += of_length
    if not prompts:
        raise UserError(
            f"--lengths {' '.join(map(str, lengths))}: none has room for {num_keys} keys and the question; "
            "give longer ones or fewer --keys"
        )
    return prompts


@torch.inference_mode()
def answered(model: CausalModel, prompts: Sequence[Prompt]) -> list[bool]:
    """Whether greedy decoding from each prompt (all of one length) gives its answer in full.

    Computed in one forward pass with the answer fed in. This is exact: greedy decoding gives the answer if
    and only if each answer token is the argmax after the prompt and the answer tokens before it, and those
    are the inputs here. At the first miss the two part, but then the answer is wrong either way. Logits are
    computed for the answers' positions alone.
    """
    tokens = torch.tensor([prompt.tokens for prompt in prompts], device=model.device)
    last = max(prompt.num_answer_tokens for prompt in prompts)
    greedy = torch.cat([logits.argmax(dim=-1) for logits in model.logit_chunks(tokens[:, :-1], last)])
    right = (greedy.view(len(prompts), last) == tokens[:, -last:]).cpu()
    return [_all_true(row[-prompt.num_answer_tokens :]) for row, prompt in zip(right, prompts, strict=True)]


def _all_true(row: Tensor) -> bool:
    return bool(row.all().item())


def measure_retrieval(
    model: CausalModel, task: str, num_keys: int, prompts: Sequence[Prompt], tokens_per_batch: int
) -> Retrieval:
    """Scores every prompt, batched by length, and gathers them in cells. Raises `UserError` when there is no
    prompt."""
    lengths = tuple(sorted({prompt.length for prompt in prompts}))
    depths = tuple(sorted({prompt.depth for prompt in prompts}))
    scores: dict[tuple[int, float], list[bool]] = {(length, depth): [] for length in lengths for depth in depths}
    with tqdm(total=len(prompts), desc=f"{model.name}: {task}", unit="prompt", disable=None, leave=False) as progress:
        for length in lengths:
            of_length = [prompt for prompt in prompts if prompt.length == length]
            size = max(1, tokens_per_batch // length)
            for start in range(0, len(of_length), size):
                batch = of_length[start : start + size]
                for prompt, right in zip(batch, answered(model, batch), strict=True):
                    scores[prompt.length, prompt.depth].append(right)
                progress.update(len(batch))
    cells = tuple(Cell(length, depth, len(hits), sum(hits) / len(hits)) for (length, depth), hits in scores.items())
    return Retrieval(task, num_keys, lengths, depths, cells)
