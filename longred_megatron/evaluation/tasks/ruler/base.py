"""What RULER's tasks have in common: its rules of scoring.

RULER: Hsieh et al., arXiv 2404.06654. Definitions and wording are those of its code, NVIDIA/RULER; docs/ruler.md
states them, and where the tasks here differ.
"""

import re
from collections.abc import Sequence

from longred_megatron.evaluation.tasks.base import Prompt
from longred_megatron.evaluation.tasks.written import WrittenTask

_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f]")


class RulerTask(WrittenTask):
    """Scored by the share of the expected strings that the output names, RULER's rule for all but questions."""

    group = "ruler"
    has_depths = False
    score_meaning = "mean share of the expected strings named"
    rule = "share of `expected` that the output contains, whatever their case"

    def score(self, prompt: Prompt, text: str) -> float:
        return string_match_all(text, prompt.expected)


def string_match_all(output: str, references: Sequence[str]) -> float:
    """The share of the references that the output contains, whatever their case."""
    return sum(_contains(output, reference) for reference in references) / len(references)


def string_match_part(output: str, references: Sequence[str]) -> float:
    """1 when the output contains any of the references, whatever its case, else 0."""
    return float(any(_contains(output, reference) for reference in references))


def _contains(output: str, reference: str) -> bool:
    return reference.lower() in _CONTROL_CHARACTERS.sub("\n", output).lower()
