"""RULER's common words extraction (`cwe`): which ten words of a numbered list are in it most often?"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longred_megatron.evaluation.tasks.base import Place
from longred_megatron.evaluation.tasks.ruler.base import RulerTask
from longred_megatron.evaluation.tasks.ruler.words import draw_words
from longred_megatron.evaluation.tasks.written import Written

INSTRUCTION = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
PREFIX = " Answer: The top 10 words that appear most often in the list are:"
NUM_COMMON = 10


@dataclass(frozen=True)
class WordList:
    """How often a list has each of its `NUM_COMMON` common words, and each of the others."""

    common: int
    others: int

    def draw(self, num_words: int, rng: random.Random) -> tuple[str, list[str]]:
        """A shuffled, numbered list of `num_words` different words, and the common ones."""
        words = draw_words(num_words, rng)
        entries = words[:NUM_COMMON] * self.common + words[NUM_COMMON:] * self.others
        rng.shuffle(entries)
        return numbered(entries), words[:NUM_COMMON]


# RULER's lists repeat less below this length: the list asked about, the solved example, and the example's words.
LONG_TOKENS = 4096
SHORT, SHORT_EXAMPLE, SHORT_EXAMPLE_WORDS = WordList(6, 1), WordList(3, 1), 20
LONG, LONG_EXAMPLE, LONG_EXAMPLE_WORDS = WordList(30, 3), WordList(10, 3), 40


class CommonWords(RulerTask):
    """A list of words after one solved example. A unit is one word, which the list has several times. Expected are
    the ten common words."""

    name = "cwe"
    title = "Common words"
    num_new_tokens = 120
    least_units = NUM_COMMON + 1

    def writer(self, place: Place) -> Callable[[int], Written]:
        seed = place.rng.getrandbits(64)
        return lambda num_units: _write(num_units, place.length, random.Random(seed))


def _write(num_units: int, length: int, rng: random.Random) -> Written:
    words, example = (SHORT, SHORT_EXAMPLE) if length < LONG_TOKENS else (LONG, LONG_EXAMPLE)
    solved, common = example.draw(SHORT_EXAMPLE_WORDS if length < LONG_TOKENS else LONG_EXAMPLE_WORDS, rng)
    before = f"{INSTRUCTION.format(context=solved)}{PREFIX} {numbered(common)}\n"
    context, common = words.draw(num_units, rng)
    return Written(before + INSTRUCTION.format(context=context), PREFIX, tuple(common))


def numbered(words: Sequence[str]) -> str:
    """1. one 2. two 3. three."""
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))
