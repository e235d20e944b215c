"""The classes of hostile cases, by name: each a generator of cases."""

from collections.abc import Callable, Iterator

from tests.hostile import code_execution, old_results, outputs, run_folder, sound, users_things
from tests.hostile.case import Case

CLASSES: dict[str, Callable[[], Iterator[Case]]] = {
    "sound": sound.cases,
    "code_execution": code_execution.cases,
    "old_results": old_results.cases,
    "run_folder": run_folder.cases,
    "users_things": users_things.cases,
    "outputs": outputs.cases,
}
