"""Retrieval where the question shares no word with what it asks for: `nonliteral`, and its literal control.

The idea is NoLiMa's (arXiv 2502.05167): the text says that a person lived beside a landmark, the question asks who
lived in its city. A model that matches words finds nothing; the control asks by the landmark itself. Facts, people
and wording are our own.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longred_megatron.evaluation.tasks.base import Place, Prompt
from longred_megatron.evaluation.tasks.hidden import filler_words, in_text
from longred_megatron.evaluation.tasks.written import Written, WrittenTask

INSTRUCTION = (
    "Here is a text. Read it with care, there is one question about it at its end.\n\n{context}\n\n"
    "Question: Who {asked}?"
)
PREFIX = " Answer: The one who {asked} is"
_NAMES = """
Abelard Benedikta Cosima Darragh Eskil Fenella Gideon Hedwig Ingeborg Joachim Katinka Leopold Mathilda Nikolai Ottilie
Percival Quentin Rosalind Saskia Thaddeus Ulrika Valentin Wilhelmina Xavier Yolanda Zacharias
"""
NAMES = tuple(_NAMES.split())
# A stretch of text may name a few of the people and facts, which are then drawn again.
MOST_DRAWS = 100


@dataclass(frozen=True)
class Relation:
    """stated: what the text says of a person and the first word of a pair; asked: the question, by the second word;
    asked_literally: by the first. pairs: whoever knows the first word knows that it leads to the second."""

    stated: str
    asked: str
    asked_literally: str
    pairs: tuple[tuple[str, str], ...]


RELATIONS = (
    Relation(
        "In those years {name} rented a small room right beside {first}.",
        "has lived in {second}",
        "rented a small room right beside {first}",
        (
            ("the Eiffel Tower", "Paris"),
            ("the Colosseum", "Rome"),
            ("the Brandenburg Gate", "Berlin"),
            ("Big Ben", "London"),
            ("the Kremlin", "Moscow"),
            ("the Acropolis", "Athens"),
            ("the Hagia Sophia", "Istanbul"),
            ("the Statue of Liberty", "New York"),
            ("the Golden Gate Bridge", "San Francisco"),
            ("the Sagrada Familia", "Barcelona"),
            ("the Prado", "Madrid"),
            ("the Rialto Bridge", "Venice"),
            ("the Forbidden City", "Beijing"),
            ("the Burj Khalifa", "Dubai"),
            ("the Space Needle", "Seattle"),
            ("the Charles Bridge", "Prague"),
        ),
    ),
    Relation(
        "From dawn to dusk {name} was busy with {first}.",
        "worked as {second}",
        "was busy with {first}",
        (
            ("a stethoscope and many patients", "a doctor"),
            ("an anvil and glowing horseshoes", "a blacksmith"),
            ("a chalkboard and thirty pupils", "a teacher"),
            ("an oven full of loaves", "a baker"),
            ("a plough and two fields of barley", "a farmer"),
            ("nets full of herring", "a fisher"),
            ("a gavel and the verdict of the jury", "a judge"),
            ("a telescope and the moons of Jupiter", "an astronomer"),
            ("needle, thread and the hems of coats", "a tailor"),
            ("bees and their hives", "a beekeeper"),
            ("a leaking faucet and rusty pipes", "a plumber"),
            ("the scissors, combs and curls of customers", "a hairdresser"),
        ),
    ),
)


class Nonliteral(WrittenTask):
    """One sentence in text, at the depth of the place; the question is about it in other words. A unit is a word."""

    name = "nonliteral"
    title = "Non-literal needle"
    score_meaning = "share of prompts whose person is named"
    rule = "1 if the output contains `expected`, whatever its case, else 0"
    num_new_tokens = 16
    least_units = 1

    def asked(self, relation: Relation) -> str:
        """How the question is asked, with places for the words of a pair."""
        return relation.asked

    def writer(self, place: Place) -> Callable[[int], Written]:
        words = filler_words(place)
        text = " ".join(words)
        for _ in range(MOST_DRAWS):
            relation, name = place.rng.choice(RELATIONS), place.rng.choice(NAMES)
            first, second = place.rng.choice(relation.pairs)
            if not any(said in text for said in (name, first, second)):
                break
        needle = relation.stated.format(name=name, first=first)
        asked = self.asked(relation).format(first=first, second=second)
        seed = place.rng.getrandbits(64)
        return lambda num_units: _write(needle, asked, name, words, num_units, place.depth, random.Random(seed))

    def score(self, prompt: Prompt, text: str) -> float:
        return float(prompt.expected[0].lower() in text.lower())


class NonliteralControl(Nonliteral):
    """Asked with the words of the sentence: what a model that matches words can do."""

    name = "nonliteral-control"
    title = "Literal control"

    def asked(self, relation: Relation) -> str:
        return relation.asked_literally


def _write(
    needle: str, asked: str, name: str, words: Sequence[str], num_words: int, depth: float | None, rng: random.Random
) -> Written:
    context = in_text([needle], words, num_words, depth, rng)
    return Written(INSTRUCTION.format(context=context, asked=asked), PREFIX.format(asked=asked), (name,))
