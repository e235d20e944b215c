"""Keys: the same for the same text in any micro-batch, another one where a teacher would say something else."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longred_megatron.families import read_architecture
from longred_megatron.objectives.base import HeadEntries, Tap
from longred_megatron.precision import Precision
from longred_megatron.teacher_cache.keys import TeacherKeys
from tests.checkpoint.small_models import write_model
from tests.training.workspace import write_perturbed

PLACES = (Tap(2), Tap(2, "query"), Tap(4, "entries"))
FEW = HeadEntries(4, 5, 1.0, 100)
TEXT: dict[str, Any] = {
    "tokens": torch.arange(24).reshape(3, 8) % 7,
    "positions": torch.arange(8).expand(3, 8),
    "documents": None,
    "length": 8,
    "places": PLACES,
    "few": FEW,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_model("llama_3", folder / "model")
    write_perturbed(folder / "model", folder / "other")
    return folder


def keys(folder: Path, name: str = "model", params: str = "fp32", number_format: str = "exact") -> TeacherKeys:
    architecture = read_architecture(folder / name)
    return TeacherKeys(folder / name, architecture, Precision(params=params), number_format)


def test_they_depend_on_the_text_and_not_on_the_micro_batch(folder: Path) -> None:
    whole = keys(folder).of(**TEXT)
    order = [2, 0]
    part = keys(folder).of(**TEXT | {"tokens": TEXT["tokens"][order], "positions": TEXT["positions"][order]})
    assert part == [whole[i] for i in order]
    assert len({key for each in whole for key in each.values()}) == 3 * len(PLACES)
    assert all(len(key) == 64 for each in whole for key in each.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": TEXT["tokens"] + 1},
        {"positions": TEXT["positions"] + 1},
        {"documents": [[4, 4]] * 3},
    ],
    ids=["tokens", "positions", "documents"],
)
def test_what_the_teacher_sees_changes_all(changes: dict[str, Any], folder: Path) -> None:
    before, after = (keys(folder).of(**values) for values in (TEXT, TEXT | changes))
    assert not set(before[0].values()) & set(after[0].values())


@pytest.mark.parametrize(
    "settings", [{"name": "other"}, {"params": "bf16"}, {"number_format": "fp8"}], ids=lambda each: str(*each)
)
def test_another_teacher_changes_all(settings: dict[str, Any], folder: Path) -> None:
    assert not set(keys(folder).of(**TEXT)[0].values()) & set(keys(folder, **settings).of(**TEXT)[0].values())


def test_one_changed_weight_row_in_each_tensor_is_another_teacher(folder: Path) -> None:
    """The rule that some rows stand for all: what training changes, it changes in all of them."""
    ours, theirs = (keys(folder, name).of(**TEXT)[0][Tap(2)] for name in ("model", "other"))
    assert ours != theirs


def test_the_temperature_and_the_number_of_entries_change_those_alone(folder: Path) -> None:
    before = keys(folder).of(**TEXT)[0]
    for few in (FEW._replace(number=6), FEW._replace(temperature=2.0), FEW._replace(drawn=True)):
        after = keys(folder).of(**TEXT | {"few": few})[0]
        assert [before[place] == after[place] for place in PLACES] == [True, True, False]


def test_a_rope_that_depends_on_the_length_changes_with_it(folder: Path) -> None:
    architecture = read_architecture(folder / "model")
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    dynamic = replace(architecture, rope=rope)
    own = TeacherKeys(folder / "model", dynamic, Precision(params="fp32"), "exact")
    longer = TEXT | {"length": 4 * architecture.max_position_embeddings}
    assert own.of(**TEXT)[0][Tap(2)] != own.of(**longer)[0][Tap(2)]
    assert keys(folder).of(**TEXT) == keys(folder).of(**longer)  # another RoPE does not
