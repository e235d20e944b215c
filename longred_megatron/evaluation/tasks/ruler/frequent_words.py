"""RULER's frequent words extraction (`fwe`): which three coded words does a text hold most often?"""

import math
import random
import string
from collections.abc import Callable, Sequence

from longred_megatron.evaluation.tasks.base import Place
from longred_megatron.evaluation.tasks.ruler.base import RulerTask
from longred_megatron.evaluation.tasks.written import Written

INSTRUCTION = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
    "appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What "
    "are the three most frequently appeared words in the above coded text?"
)
PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
NUM_ASKED = 3
WORD_LETTERS = 6
DOTS = "..."
TOKENS_PER_VOCABULARY_WORD = 50
ZETA_OF_2 = math.pi**2 / 6


class FrequentWords(RulerTask):
    """A text of made-up words; the k-th of the vocabulary is in it int(units / (k^2 * zeta(2))) times, so by Zeta's
    distribution with alpha = 2. The first is dots, to be ignored; expected are the second to the fourth.

    least_units: the fewest from which on the fourth word is in the text more often than the fifth.
    """

    name = "fwe"
    title = "Frequent words"
    num_new_tokens = 50
    least_units = math.ceil(2 * (NUM_ASKED + 1) ** 2 * ZETA_OF_2)

    def writer(self, place: Place) -> Callable[[int], Written]:
        size = max((place.length - self.num_new_tokens) // TOKENS_PER_VOCABULARY_WORD, NUM_ASKED + 2)
        vocabulary = _vocabulary(size, place.rng)
        seed = place.rng.getrandbits(64)
        return lambda num_units: _write(num_units, vocabulary, random.Random(seed))


def _vocabulary(size: int, rng: random.Random) -> list[str]:
    """The dots, then different words of random letters."""
    words = {DOTS: None}
    while len(words) < size:
        words["".join(rng.choices(string.ascii_lowercase, k=WORD_LETTERS))] = None
    return list(words)


def _write(num_units: int, vocabulary: Sequence[str], rng: random.Random) -> Written:
    text: list[str] = []
    for rank, word in enumerate(vocabulary, start=1):
        text += [word] * int(num_units / (rank**2 * ZETA_OF_2))
    rng.shuffle(text)
    return Written(INSTRUCTION.format(context=" ".join(text)), PREFIX, tuple(vocabulary[1 : NUM_ASKED + 1]))
