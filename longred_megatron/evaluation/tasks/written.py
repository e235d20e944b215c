"""Tasks whose prompts are written as text, with as much haystack as their length has room for."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from longred_megatron.evaluation.tasks.base import Generation, Place, Prompt
from longred_megatron.evaluation.texts import TextEncoder

FIRST_STEP_UNITS = 16


@dataclass(frozen=True)
class Written:
    """A prompt as text. instruction: what a user would type; answer_prefix: how the answer begins, the model goes
    on from its end; expected: the strings that a right answer names."""

    instruction: str
    answer_prefix: str
    expected: tuple[str, ...]

    @property
    def text(self) -> str:
        return self.instruction + self.answer_prefix


class WrittenTask(Generation):
    """A task whose prompts grow by units: words, lines, documents. A prompt has as many as its length has room for,
    with `num_new_tokens` kept for the answer. least_units: the fewest a prompt can have."""

    least_units: int

    @abstractmethod
    def writer(self, place: Place) -> Callable[[int], Written]:
        """Writes the prompt at `place` with a number of units, always from the same draws. More units make a longer
        text, as a rule."""

    def facts(self) -> dict[str, int | str]:
        return {"template": "chat" if self.options.chat_template else "none"}

    def prompt(self, place: Place) -> Prompt | None:
        write = self.writer(place)
        budget = place.length - self.num_new_tokens
        num_units = most_units(lambda number: len(self._tokens(write(number), place.encoder)), self.least_units, budget)
        if num_units is None:
            return None
        written = write(num_units)
        return place.prompt(self._tokens(written, place.encoder), written.expected)

    def _tokens(self, written: Written, encoder: TextEncoder) -> list[int]:
        if self.options.chat_template:
            return encoder.chat(written.instruction, written.answer_prefix)
        return [*encoder.start, *encoder.encode(written.text)]


def most_units(num_tokens: Callable[[int], int], least: int, budget: int) -> int | None:
    """The largest number of units, from `least` up, with num_tokens(units) <= budget; None when `least` is too many.

    num_tokens should grow with the units, which it may do unevenly: the number found fits in any case, and one
    more does not. Raises the bracket by straight lines, then by turns guesses and halves it.
    """
    low, low_tokens = least, num_tokens(least)
    if low_tokens > budget:
        return None
    high = least + FIRST_STEP_UNITS
    high_tokens = num_tokens(high)
    while high_tokens <= budget:
        per_unit = max((high_tokens - low_tokens) / (high - low), 1 / FIRST_STEP_UNITS)
        low, low_tokens = high, high_tokens
        high += round(1.05 * (budget - low_tokens) / per_unit) + 1
        high_tokens = num_tokens(high)
    halve = False
    while high - low > 1:
        share = 0.5 if halve else (budget - low_tokens) / (high_tokens - low_tokens)
        middle = min(max(low + round(share * (high - low)), low + 1), high - 1)
        middle_tokens = num_tokens(middle)
        halve = not halve
        if middle_tokens <= budget:
            low, low_tokens = middle, middle_tokens
        else:
            high, high_tokens = middle, middle_tokens
    return low
