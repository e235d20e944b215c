"""A user's mistake: one clear message, exit code 2, no traceback."""

import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """Something the user can mend. Holds every problem found, each a sentence that says what to change."""

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
