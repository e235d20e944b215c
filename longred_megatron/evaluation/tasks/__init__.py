"""The tasks that can be asked of a model. A new one is a class in a file of its own, and a line here."""

import difflib
from collections.abc import Sequence

from longred_megatron.errors import UserError
from longred_megatron.evaluation.tasks.base import Options, Task
from longred_megatron.evaluation.tasks.multi_key import MultiKey
from longred_megatron.evaluation.tasks.passkey import Passkey

TASKS: dict[str, type[Task]] = {task.name: task for task in (Passkey, MultiKey)}
DEFAULT_TASKS = ("passkey", "multi-key")


def chosen_tasks(names: Sequence[str], options: Options) -> list[Task]:
    """The tasks named, each once, in their order here. Raises `UserError` for names that are none, and for what a task
    finds wrong with its options."""
    problems = []
    for name in names:
        if name not in TASKS:
            nearest = difflib.get_close_matches(name, TASKS, n=3)
            tip = f"did you mean {' or '.join(nearest)}?" if nearest else f"there are {', '.join(TASKS)}"
            problems.append(f"--tasks {name}: no such task; {tip}")
    tasks = [task(options) for name, task in TASKS.items() if name in names]
    problems += [problem for task in tasks for problem in task.problems()]
    if problems:
        raise UserError(*problems)
    return tasks
