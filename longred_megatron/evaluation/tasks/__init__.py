"""The tasks that can be asked of a model. A new one is a class in a file of its own, and a line here."""

import difflib
from collections.abc import Sequence

from tqdm import tqdm

from longred_megatron.errors import UserError
from longred_megatron.evaluation.haystacks import Haystacks
from longred_megatron.evaluation.tasks.association import Nonliteral, NonliteralControl
from longred_megatron.evaluation.tasks.base import NoRoomError, Options, Prompt, Task
from longred_megatron.evaluation.tasks.grid import Grid
from longred_megatron.evaluation.tasks.multi_key import MultiKey
from longred_megatron.evaluation.tasks.passkey import Passkey
from longred_megatron.evaluation.tasks.ruler import RULER_TASKS
from longred_megatron.evaluation.tasks.written import WrittenTask
from longred_megatron.evaluation.texts import TextEncoder

_ALL: tuple[type[Task], ...] = (Passkey, MultiKey, Nonliteral, NonliteralControl, *RULER_TASKS)
TASKS = {task.name: task for task in _ALL}
GROUPS = tuple(dict.fromkeys(task.group for task in TASKS.values() if task.group))
DEFAULT_TASKS = ("passkey", "multi-key")


def chosen_tasks(names: Sequence[str], options: Options) -> tuple[list[Task], list[str]]:
    """The tasks named, each once, in their order here, and notes on what is left out. A group's name stands for those
    of its tasks that the options suffice for.

    Raises `UserError` for names that are none, and for what a task finds wrong with its options.
    """
    problems, notes = [], []
    for name in names:
        if name not in TASKS and name not in GROUPS:
            nearest = difflib.get_close_matches(name, [*GROUPS, *TASKS], n=3)
            tip = f"did you mean {' or '.join(nearest)}?" if nearest else f"there are {', '.join([*TASKS, *GROUPS])}"
            problems.append(f"--tasks {name}: no such task; {tip}")
    tasks = []
    for name, task in TASKS.items():
        if name in names or task.group in names:
            missing = None if name in names else task.missing(options)
            if missing:
                notes.append(f"{name}: left out, {missing}")
            else:
                tasks.append(task(options))
    problems += dict.fromkeys(problem for task in tasks for problem in task.problems())
    if options.chat_template and not any(isinstance(task, WrittenTask) for task in tasks):
        problems.append(
            f"--chat-template: none of --tasks {' '.join(names)} is written as a message; add ruler or nonliteral"
        )
    if problems:
        raise UserError(*problems)
    return tasks, notes


def make_prompts(
    tasks: Sequence[Task], names: Sequence[str], encoder: TextEncoder, haystacks: Haystacks, grid: Grid
) -> tuple[dict[Task, list[Prompt]], list[str]]:
    """The prompts of every task, and notes on tasks that have room at no length and are left out.

    names: what the user asked for. Raises `NoRoomError` for such a task that was asked for by its own name, and when no
    task is left.
    """
    prompts: dict[Task, list[Prompt]] = {}
    problems: list[str] = []
    notes: list[str] = []
    for task in tqdm(tasks, desc="writing prompts", unit="task", disable=None, leave=False):
        try:
            prompts[task] = task.prompts(encoder, haystacks, grid)
        except NoRoomError as error:
            (problems if task.name in names else notes).extend(error.problems)
    if problems or not prompts:
        raise NoRoomError(*(problems or notes))
    return prompts, notes
