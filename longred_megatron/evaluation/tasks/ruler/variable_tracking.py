"""RULER's variable tracking (`vt`): a value is handed from variable to variable; which ones hold it?"""

import random
import string
from collections.abc import Callable
from itertools import pairwise

from longred_megatron.evaluation.tasks.base import Place
from longred_megatron.evaluation.tasks.ruler.base import RulerTask
from longred_megatron.evaluation.tasks.ruler.needles import NOISE
from longred_megatron.evaluation.tasks.written import Written, most_units

INSTRUCTION = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above."
)
# The space at its end is RULER's, and gives two spaces before the solved example's answer.
PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {number} variables are assigned "
    "the value {value}, they are: "
)
NUM_HOPS = 4
NAME_LETTERS, EXAMPLE_NAME_LETTERS = 5, 3
# RULER's solved example has at most 500 tokens. Where that is more than an eighth of the prompt (below 4,000 tokens,
# which RULER does not measure) it has an eighth.
EXAMPLE_TOKENS, EXAMPLE_SHARE = 500, 8


class VariableTracking(RulerTask):
    """One chain of `NUM_HOPS` + 1 variables in noise, after one solved example. A unit is the five sentences of
    noise of the needle tasks. Expected are the names of the chain's variables."""

    name = "vt"
    title = "Variable tracking"
    num_new_tokens = 30
    least_units = NUM_HOPS + 1

    def writer(self, place: Place) -> Callable[[int], Written]:
        example_seed, seed = place.rng.getrandbits(64), place.rng.getrandbits(64)

        def example(num_units: int) -> Written:
            return _one_chain(num_units, EXAMPLE_NAME_LETTERS, random.Random(example_seed))

        num_units = most_units(
            lambda number: len(place.encoder.encode(example(number).text)),
            self.least_units,
            min(EXAMPLE_TOKENS, place.length // EXAMPLE_SHARE),
        )
        solved = example(num_units or self.least_units)
        before = f"{solved.text} {' '.join(solved.expected)}\n\n"

        def write(num_units: int) -> Written:
            asked = _one_chain(num_units, NAME_LETTERS, random.Random(seed))
            return Written(before + asked.instruction, asked.answer_prefix, asked.expected)

        return write


def _one_chain(num_units: int, num_letters: int, rng: random.Random) -> Written:
    """VAR A = 12345, VAR B = VAR A and so on, in this order among lines of noise."""
    names: list[str] = []
    while len(names) < NUM_HOPS + 1:
        name = "".join(rng.choices(string.ascii_uppercase, k=num_letters))
        if name not in names:
            names.append(name)
    value = str(rng.randint(10_000, 99_998))
    # RULER's lines end with a space, but for the first.
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {name} = VAR {before} " for before, name in pairwise(names)]
    lines = [NOISE] * num_units
    for index, place in enumerate(sorted(rng.sample(range(num_units), len(chain)))):
        lines.insert(place + index, chain[index])
    return Written(
        INSTRUCTION.format(context="\n".join(lines), value=value),
        PREFIX.format(number=len(names), value=value),
        tuple(names),
    )
