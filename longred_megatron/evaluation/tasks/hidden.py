"""Needles hidden in a haystack: among lines, or between the sentences of a text."""

import random
import re
from collections.abc import Sequence

from longred_megatron.errors import UserError
from longred_megatron.evaluation.tasks.base import Place

# Needles stand at some of 40 depths, evenly spaced from 0 to 1.
NUM_DEPTHS = 40
# Text without a full stop (code, tables) is parted after this many words: a needle needs a place to stand.
LONGEST_SENTENCE_WORDS = 64
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*$")


def filler_words(place: Place) -> list[str]:
    """The words of the place's stretch of text, without the white space between them. Raises `UserError` when it has
    none."""
    if words := place.haystack.text(place.length).split():
        return words
    raise UserError(f"--tasks {place.task}: {place.length} tokens of the texts are white space alone; give other texts")


def in_lines(needles: Sequence[str], lines: Sequence[str], depth: float | None, rng: random.Random) -> str:
    """Lines with the needles before some of them. The first needle stands at `depth`; None: anywhere."""
    places = [rng.randrange(len(lines)) for _ in needles]
    if depth is not None:
        places[0] = round(depth * len(lines))
    return "\n".join(_hidden(needles, lines, places))


def in_text(
    needles: Sequence[str], words: Sequence[str], num_words: int, depth: float | None, rng: random.Random
) -> str:
    """The first words of the text in sentences, with the needles between these, each at a depth of its own of
    RULER's grid, but for the first where `depth` is given. A text that is too short begins again, as in RULER."""
    sentences = split_sentences([words[index % len(words)] for index in range(num_words)])
    depths = [step / (NUM_DEPTHS - 1) for step in rng.sample(range(NUM_DEPTHS), len(needles))]
    if depth is not None:
        depths[0] = depth
    return " ".join(_hidden(needles, sentences, [int(each * len(sentences)) for each in depths]))


def _hidden(needles: Sequence[str], hay: Sequence[str], places: Sequence[int]) -> list[str]:
    """The hay with each needle before the item of its place; those of one place in their order."""
    parts: list[str] = []
    taken = 0
    for place, needle in sorted(zip(places, needles, strict=True), key=lambda pair: pair[0]):
        parts += [*hay[taken:place], needle]
        taken = place
    return parts + list(hay[taken:])


def split_sentences(words: Sequence[str]) -> list[str]:
    """Words to sentences: up to a word that ends with a full stop, a question or exclamation mark, or to
    `LONGEST_SENTENCE_WORDS`."""
    sentences: list[str] = []
    sentence: list[str] = []
    for word in words:
        sentence.append(word)
        if _SENTENCE_END.search(word) or len(sentence) == LONGEST_SENTENCE_WORDS:
            sentences.append(" ".join(sentence))
            sentence = []
    return sentences + ([" ".join(sentence)] if sentence else [])
