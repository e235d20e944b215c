"""What every kind of objective has, by being one: a reference, checks, and a place in the other tests."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from longred_megatron.objectives import KINDS
from longred_megatron.objectives.base import Objective
from longred_megatron.recipe import check_phases, load_recipe, read_phases
from longred_megatron.settings import Mark, marked_fields
from longred_megatron.training.microbatches import MicroBatchSource
from tests.objectives.examples import ALL, VARIANTS, all_kinds, example, name_of
from tests.objectives.references import REFERENCES, step_loss
from tests.training.test_reference_parity import megatron_gradients, total_loss
from tests.training.workspace import build_run, make_workspace, write_recipe

CASES = [(kind, changes) for kind in ALL for changes in ({}, *VARIANTS.get(name_of(kind), []))]


def case_id(value: Any) -> str:
    return name_of(value) if isinstance(value, type) else "-".join(f"{k}={v}" for k, v in value.items()) or "example"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace for recipes of the tests here."""
    folder = tmp_path_factory.mktemp("kinds")
    make_workspace(folder)
    return folder


def test_every_kind_has_a_reference() -> None:
    assert REFERENCES.keys() == KINDS.keys(), "write the kind in plain torch in tests/objectives/references.py"


@pytest.mark.parametrize(("kind", "changes"), CASES, ids=case_id)
def test_loss_and_gradients_equal_the_reference(
    kind: type[Objective], changes: dict[str, Any], folder: Path, groups: ProcessGroupCollection
) -> None:
    recompute = "full" if changes else "none"
    recipe = write_recipe(folder, objectives={"mine": example(kind, 4, **changes)})
    assert_same(build_run(recipe, groups, f"training.recompute={recompute}"))


def test_all_kinds_in_one_step(folder: Path, groups: ProcessGroupCollection) -> None:
    assert_same(build_run(write_recipe(folder, objectives=all_kinds(4)), groups, "training.recompute=selective"))


def assert_same(run: Any) -> None:
    microbatches = run.data.step(1, 0, 1)
    expected_loss, expected = step_loss(run, microbatches)
    loss = total_loss(microbatches, run.train_step.forward_backward(microbatches)[0])
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-7)  # divergences are sums of cancelling terms
    for name, gradient in megatron_gradients(run).items():
        wanted = expected.get(name, torch.zeros_like(gradient))
        # Relative to the tensor's norm: single elements near zero are sums of cancelling terms.
        assert (gradient - wanted).norm() <= 1e-5 * wanted.norm() + 1e-9, name


@pytest.mark.parametrize("kind", ALL, ids=case_id)
def test_layers_out_of_range_are_a_problem(kind: type[Objective], folder: Path) -> None:
    for key in marked_fields(kind, Mark.LAYERS):
        [phase] = read_phases(load_recipe(write_recipe(folder, objectives={"mine": example(kind, 4, **{key: [99]})})))
        problems = check_phases([phase], 1, gpu=False)
        assert f"`objectives.mine.{key}` holds 99: the layers of model.hf are 1 to 4" in problems


@pytest.mark.parametrize("kind", ALL, ids=case_id)
def test_the_example_has_no_problem_and_survives_a_dump(kind: type[Objective], folder: Path) -> None:
    recipe = write_recipe(folder, objectives={"mine": example(kind, 4)}, teacher={"hf": "model"})
    [phase] = read_phases(load_recipe(recipe))
    assert check_phases([phase], 1, gpu=False) == []
    settings = phase.recipe.objectives["mine"]
    assert kind.model_validate(settings.model_dump(mode="json")) == settings


@pytest.mark.parametrize("kind", ALL, ids=case_id)
def test_a_batch_is_what_it_says(kind: type[Objective], folder: Path) -> None:
    """Shapes, types and counts that the step relies on."""
    for changes in ({}, *VARIANTS.get(name_of(kind), [])):
        [phase] = read_phases(load_recipe(write_recipe(folder, objectives={"mine": example(kind, 4, **changes)})))
        batch, _ = MicroBatchSource(phase).step(1, 0, 1)
        needs = phase.needs["mine"]
        assert batch.tokens.shape == (4, 64) and batch.tokens.dtype == torch.int64
        assert batch.labels.shape == batch.student_positions.shape == (4, 64)
        assert (batch.teacher_positions is not None) == needs.teacher
        labelled = int((batch.labels != -100).sum())
        assert batch.num_valid_tokens == (labelled if needs.student_head else 256)
        assert batch.documents is None or all(sum(lengths) == 64 for lengths in batch.documents)
