"""The classes of hostile cases, by name: each a generator of cases."""

from collections.abc import Callable, Iterator

from tests.hostile import (
    code_execution,
    data,
    ends,
    environment,
    mutations,
    numbers,
    old_results,
    outputs,
    paths,
    run_folder,
    sound,
    users_things,
)
from tests.hostile.case import Case

CLASSES: dict[str, Callable[[], Iterator[Case]]] = {
    "sound": sound.cases,
    "code_execution": code_execution.cases,
    "old_results": old_results.cases,
    "run_folder": run_folder.cases,
    "users_things": users_things.cases,
    "outputs": outputs.cases,
    "numbers": numbers.cases,
    "data": data.cases,
    "paths": paths.cases,
    "environment": environment.cases,
    "ends": ends.cases,
    "mutations": mutations.cases,
}

QUICK_CASES = 25  # of a class, in the form that CI runs


def cases_of(name: str, quick: bool) -> list[Case]:
    """The cases of a class; quick: a part of them, spread evenly, without those that take long."""
    cases = [case for case in CLASSES[name]() if case.quick or not quick]
    share = max(1, -(-len(cases) // QUICK_CASES)) if quick else 1
    return cases[::share]
