"""Questions with answers and documents, from a file of the user's."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longred_megatron.data.documents import MAX_DOCUMENT_BYTES
from longred_megatron.errors import UserError, first_few
from longred_megatron.files import reason

FORMAT = '{"question": "...", "answers": ["..."], "context": "..."}, or "documents": ["...", "..."] for "context"'


@dataclass(frozen=True)
class Question:
    """answers: any of them is right; documents: those that are needed to answer, one or several."""

    question: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]


def read_questions(file: Path) -> list[Question]:
    """One question a line of a .jsonl file, see `FORMAT`. Raises `UserError` with the lines that are none."""
    questions: list[Question] = []
    problems: list[str] = []
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        questions.append(_question(line))
                    except (ValueError, RecursionError) as error:
                        problems.append(f"{number} ({error})")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(f"--questions {file}: cannot be read ({reason(error)}); give a .jsonl file") from error
    if problems:
        raise UserError(f"--questions {file}: line {first_few(problems)}; every line must be like {FORMAT}")
    if not questions:
        raise UserError(f"--questions {file}: holds no question; every line must be like {FORMAT}")
    return questions


def _question(line: bytes) -> Question:
    """Raises ValueError with what is wrong."""
    if len(line) > MAX_DOCUMENT_BYTES:
        raise ValueError(f"more than {MAX_DOCUMENT_BYTES >> 20} MiB")
    try:
        held = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error.msg}") from error
    if not isinstance(held, dict):
        raise ValueError("no JSON object")
    documents = held.get("documents", [held["context"]] if "context" in held else None)
    [question] = _texts([held.get("question")], "question")
    return Question(question, _texts(held.get("answers"), "answers"), _texts(documents, "documents"))


def _texts(value: Any, key: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(each, str) and each.strip() for each in value):
        raise ValueError(f"{key} is missing, empty or not text")
    for each in value:
        each.encode()  # half a surrogate pair is a ValueError
    return tuple(value)
