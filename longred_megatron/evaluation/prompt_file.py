"""Prompts as a file of JSON lines, with what is right and how it is scored, for any other runtime."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from longred_megatron.errors import UserError
from longred_megatron.evaluation.tasks.base import Prompt, Task
from longred_megatron.evaluation.texts import TextEncoder
from longred_megatron.files import appearing_whole, try_output

FLAG = "--write-prompts"


def check_prompt_file(path: Path) -> None:
    """Raises `UserError` where the file cannot be written, or something is there."""
    try_output(path, FLAG)
    if os.path.lexists(path):
        raise UserError(f"{FLAG} {path}: is there already; give the name of a new file")


def write_prompts(path: Path, prompts: Mapping[Task, Sequence[Prompt]], encoder: TextEncoder) -> int:
    """Writes one line a prompt and returns how many; see `prompt_line`."""
    total = sum(map(len, prompts.values()))
    with (
        appearing_whole(path) as partial,
        partial.open("w", encoding="utf-8") as file,
        tqdm(total=total, desc="writing prompts", unit="prompt", disable=None, leave=False) as bar,
    ):
        for task, of_task in prompts.items():
            for prompt in of_task:
                file.write(json.dumps(prompt_line(task, prompt, encoder), ensure_ascii=False) + "\n")
                bar.update()
    return total


def prompt_line(task: Task, prompt: Prompt, encoder: TextEncoder) -> dict[str, Any]:
    """What a line holds.

    task, prompt_set, length, depth, sample: where the prompt stands. tokens: what the model reads; text: the same
    decoded. expected: the right strings; answer: the right continuation in tokens, null where the text that the model
    writes is scored; rule: how; max_new_tokens: that greedy decoding writes.
    """
    return {
        "task": prompt.task,
        "prompt_set": prompt.prompt_set,
        "length": prompt.length,
        "depth": prompt.depth,
        "sample": prompt.sample,
        "text": encoder.decode(list(prompt.tokens)),
        "tokens": list(prompt.tokens),
        "expected": list(prompt.expected),
        "answer": list(prompt.answer) or None,
        "rule": task.rule,
        "max_new_tokens": task.num_row_tokens(prompt) - len(prompt.tokens),
    }
