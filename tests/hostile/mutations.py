"""Files of a run that hypothesis has changed: drawn first, the same ones every time, then run as any other case."""

import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.hostile.case import EVALUATE, TO_HF, TO_MEGATRON, TRAIN, Case, Prepare, editing, in_turn
from tests.hostile.data import ON_SET

EXAMPLES = 40  # of each kind of file

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
AT_A_PLACE = st.tuples(st.lists(st.integers(0, 10**6), min_size=1, max_size=4), VALUES)
AT_A_BYTE = st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=8))


def cases() -> Iterator[Case]:
    """Whatever it is: exit code 0 or 2, one message, no traceback, nothing but the output touched."""
    model = ((*EVALUATE, "model"), (*TO_MEGATRON, "model"), TRAIN)
    kinds: list[tuple[str, st.SearchStrategy, Callable[[Any], Prepare], tuple[tuple[str, ...], ...]]] = [
        ("recipe", AT_A_PLACE, lambda m: editing("recipe.yaml", in_yaml(*m)), (TRAIN,)),
        ("config.json", AT_A_PLACE, lambda m: editing("model/config.json", in_json(*m)), model),
        (
            "checkpoint.json",
            AT_A_PLACE,
            lambda m: editing("converted/checkpoint.json", in_json(*m)),
            ((*TO_HF, "converted"),),
        ),
        ("index header", AT_A_BYTE, lambda m: in_turn(ON_SET, editing("set.idx", in_header(*m, len))), (TRAIN,)),
        (
            "safetensors header",
            AT_A_BYTE,
            lambda m: editing("model/model.safetensors", in_header(*m, safetensors_header)),
            model,
        ),
    ]
    for kind, strategy, prepare, commands in kinds:
        for number, mutation in enumerate(drawn(strategy)):
            command = commands[number % len(commands)]
            # A recipe may name another folder to write to, and a run may fail in its first step.
            writes = ("out",) if command == TRAIN else ()
            yield Case(f"{kind} {number}: {ascii(mutation)[:40]}", command, prepare(mutation), (0, 2), writes=writes)


def drawn(strategy: st.SearchStrategy) -> list[Any]:
    """The same examples of a strategy every time."""
    found: list[Any] = []

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(example: Any) -> None:
        found.append(example)

    collect()
    return found


def replaced(values: Any, place: list[int], new: Any) -> Any:
    """A copy of nested mappings and lists with `new` where `place` leads: each number chooses a key."""
    if not place or not isinstance(values, dict | list) or not values:
        return new
    keys = list(values) if isinstance(values, dict) else list(range(len(values)))
    key = keys[place[0] % len(keys)]
    copy = values.copy()
    copy[key] = replaced(values[key], place[1:], new)
    return copy


def in_json(place: list[int], new: Any) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        values = json.loads(content)
        values.pop("digest", None)  # of checkpoint.json itself: earlier versions wrote none
        return json.dumps(replaced(values, place, new)).encode()

    return change


def in_yaml(place: list[int], new: Any) -> Callable[[bytes], bytes]:
    return lambda content: yaml.safe_dump(replaced(yaml.safe_load(content), place, new)).encode()


def in_header(at: int, new: bytes, length: Callable[[bytes], int]) -> Callable[[bytes], bytes]:
    """Other bytes somewhere in the first `length` of a file."""

    def change(content: bytes) -> bytes:
        start = at % max(1, length(content) - len(new))
        return content[:start] + new + content[start + len(new) :]

    return change


def safetensors_header(content: bytes) -> int:
    return 8 + struct.unpack_from("<Q", content)[0]
