"""RULER's eight needle tasks: sentences that state special magic numbers or UUIDs, hidden in a haystack."""

import random
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

from longred_megatron.evaluation.tasks.base import Options, Place
from longred_megatron.evaluation.tasks.hidden import filler_words, in_lines, in_text
from longred_megatron.evaluation.tasks.ruler.base import RulerTask
from longred_megatron.evaluation.tasks.ruler.words import draw_adjective_noun, draw_number, draw_uuid
from longred_megatron.evaluation.tasks.written import Written

NEEDLE = "One of the special magic {values} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
# RULER's wording for several values; it writes the singular where one value is asked for.
MANY_INSTRUCTION = (
    "Some special magic {values} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {values} afterwards.\n{context}\n"
    "What are all the special magic {values} for {query} mentioned in the provided text?"
)
MANY_PREFIX = " The special magic {values} for {query} mentioned in the provided text are"
ONE_INSTRUCTION = (
    "A special magic {values} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {values} afterwards.\n{context}\n"
    "What is the special magic {values} for {query} mentioned in the provided text?"
)
ONE_PREFIX = " The special magic {values} for {query} mentioned in the provided text is"
_DRAW: dict[str, Callable[[random.Random], str]] = {
    "words": draw_adjective_noun,
    "numbers": draw_number,
    "uuids": draw_uuid,
}


class Needles(RulerTask):
    """Hides num_keys * num_values needles and asks for num_queries of the keys.

    haystack: "essay" is the given text, a unit is a word of it; "noise" repeats five sentences, a unit is all five;
    "needle" is of other needles, a unit is one. Expected are all values of the keys asked for. Where that is one
    value, its needle stands at the depth of the place, and the others anywhere.
    """

    haystack: ClassVar[Literal["essay", "noise", "needle"]] = "essay"
    keys: ClassVar[Literal["words", "uuids"]] = "words"
    values: ClassVar[Literal["numbers", "uuids"]] = "numbers"
    num_keys = num_values = num_queries = 1
    num_new_tokens = 128
    has_depths = True

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.least_units = self.num_keys * self.num_values

    def writer(self, place: Place) -> Callable[[int], Written]:
        words = filler_words(place) if self.haystack == "essay" else []
        seed = place.rng.getrandbits(64)
        return lambda num_units: self._write(num_units, words, place.depth, random.Random(seed))

    def _write(self, num_units: int, words: Sequence[str], depth: float | None, rng: random.Random) -> Written:
        keys = _different(self.num_keys, self.keys, rng, set())
        values = _different(self.num_keys * self.num_values, self.values, rng, set())
        pairs = [(keys[index // self.num_values], value) for index, value in enumerate(values)]
        asked = keys[: self.num_queries]  # drawn at random, and so are those that are not asked for
        needles = [self._needle(key, value) for key, value in pairs]
        if self.haystack == "essay":
            context = in_text(needles, words, num_units, depth, rng)
        else:
            context = in_lines(needles, self._lines(num_units, {*keys, *values}, rng), depth, rng)
        one = self.num_queries * self.num_values == 1
        instruction, prefix = (ONE_INSTRUCTION, ONE_PREFIX) if one else (MANY_INSTRUCTION, MANY_PREFIX)
        names = {"values": self.values.removesuffix("s") if one else self.values, "query": _enumeration(asked)}
        return Written(
            instruction.format(context=context, **names),
            prefix.format(**names),
            tuple(value for key, value in pairs if key in asked),
        )

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(values=self.values, key=key, value=value)

    def _lines(self, num_lines: int, taken: set[str], rng: random.Random) -> list[str]:
        if self.haystack == "noise":
            return [NOISE] * num_lines
        keys = _different(num_lines, self.keys, rng, taken)
        values = _different(num_lines, self.values, rng, taken)
        return [self._needle(key, value) for key, value in zip(keys, values, strict=True)]


def _different(number: int, kind: str, rng: random.Random, taken: set[str]) -> list[str]:
    """`number` draws that differ from each other and from `taken`, which grows. RULER does not look for equal ones:
    the answer would then not be the only one."""
    drawn: list[str] = []
    while len(drawn) < number:
        each = _DRAW[kind](rng)
        if each not in taken:
            taken.add(each)
            drawn.append(each)
    return drawn


def _enumeration(words: Sequence[str]) -> str:
    """a; a, and b; a, b, and c."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + ", and " + words[-1]


class NiahSingle1(Needles):
    """One needle in noise."""

    name = "niah_single_1"
    title = "Needle in noise"
    haystack = "noise"


class NiahSingle2(Needles):
    """One needle in text."""

    name = "niah_single_2"
    title = "Needle in text"


class NiahSingle3(Needles):
    """One needle in text, whose value is a UUID."""

    name = "niah_single_3"
    title = "Needle in text, UUID"
    values = "uuids"


class NiahMultikey1(Needles):
    """Four needles in text, one asked for."""

    name = "niah_multikey_1"
    title = "Needle in text, 4 keys"
    num_keys = 4


class NiahMultikey2(Needles):
    """A needle among other needles."""

    name = "niah_multikey_2"
    title = "Needle among needles"
    haystack = "needle"


class NiahMultikey3(Needles):
    """A needle among other needles, of which keys and values are UUIDs."""

    name = "niah_multikey_3"
    title = "Needle among needles, UUIDs"
    haystack = "needle"
    keys = "uuids"
    values = "uuids"


class NiahMultivalue(Needles):
    """One key in text with four values, all asked for."""

    name = "niah_multivalue"
    title = "4 values of a key in text"
    num_values = 4
    has_depths = False


class NiahMultiquery(Needles):
    """Four keys in text, all asked for."""

    name = "niah_multiquery"
    title = "4 keys asked for in text"
    num_keys = num_queries = 4
    has_depths = False


NEEDLE_TASKS = (
    NiahSingle1,
    NiahSingle2,
    NiahSingle3,
    NiahMultikey1,
    NiahMultikey2,
    NiahMultikey3,
    NiahMultivalue,
    NiahMultiquery,
)
