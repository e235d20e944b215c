"""A user's mistake: one clear message, exit code 2, no traceback."""

import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn


class UserError(Exception):
    """Something the user can fix. Holds every problem found, each a sentence that says what to change."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


def run_cli(main: Callable[[], None]) -> NoReturn:
    """Runs a command line: exit code 0 when `main` returns, 2 with the message for a `UserError`, 130 for Ctrl-C."""
    try:
        main()
    except UserError as error:
        if len(error.problems) == 1:
            print(f"error: {error.problems[0]}", file=sys.stderr)
        else:
            print(f"error: {len(error.problems)} problems:", file=sys.stderr)
            for problem in error.problems:
                print(f"  - {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def multiples(value: int, of: int) -> str:
    """The multiples of `of` on both sides of `value`, from `of` on, for a message."""
    below, above = value // of * of, -(-value // of) * of
    return listed([below, above] if 0 < below < above else [above])


def listed(values: Iterable[Any]) -> str:
    """Comma-separated, for a message."""
    return ", ".join(str(value) for value in values)
