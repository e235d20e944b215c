"""The ranks that there are, as torchrun says it; no torch, so that a command can ask before it starts."""

import re
from collections.abc import Mapping

from longred_megatron.errors import UserError

_NUMBERS = {"RANK": "[0-9]{1,7}", "WORLD_SIZE": "[1-9][0-9]{0,6}", "MASTER_PORT": "[1-9][0-9]{0,4}"}
_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def world(environment: Mapping[str, str]) -> tuple[int, int]:
    """This process's rank and the number of ranks, as torchrun says them; (0, 1) without it.

    Raises:
        UserError: not numbers, or some of what torchrun sets is missing.
    """
    if "RANK" not in environment and environment.get("WORLD_SIZE", "1") == "1":
        return 0, 1
    missing = [name for name in _LAUNCHER if name not in environment]
    wrong = [
        f"{name}={environment[name]!r}"
        for name in _LAUNCHER
        if name in environment and name != "MASTER_ADDR" and not re.fullmatch(_NUMBERS[name], environment[name])
    ]
    if missing or wrong:
        said = [*wrong, *(f"no {name}" for name in missing)]
        raise UserError(f"the environment has {', '.join(said)}: start ranks with torchrun, which sets all of these")
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if rank >= world_size:
        raise UserError(f"the environment has RANK={rank}, WORLD_SIZE={world_size}: ranks are numbered from 0")
    return rank, world_size
