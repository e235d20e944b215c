"""The terms that one chunk owes: heads on the last chunk alone, and no gradient into a teacher's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from longred_megatron.objectives import KINDS
from longred_megatron.objectives.base import Activations, Term
from longred_megatron.training.losses import chunk_terms
from tests.objectives.examples import example
from tests.training.workspace import build_run, make_workspace, write_recipe


@pytest.fixture
def run(tmp_path: Path, groups: ProcessGroupCollection) -> Any:
    make_workspace(tmp_path)
    kinds = {name: example(KINDS[name], 4) for name in ("packed_distillation", "perturbed_positions", "relations")}
    return build_run(write_recipe(tmp_path, objectives=kinds), groups)


def terms_of(run: Any, objective: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Activations, Activations]]:
    """What the loss of an objective is handed for its first micro-batch."""
    batch = next(m for m in run.data.step(1, 0, 1) if m.objective == objective)
    handed: list[tuple[Activations, Activations]] = []

    def loss(self: Any, student: Activations, teacher: Activations, *rest: Any) -> list[Term]:
        handed.append((student, teacher))
        return []

    monkeypatch.setattr(type(batch.settings), "loss", loss)
    needs, chunk = run.phase.needs[objective], run.chunks[0]
    [teacher] = [chunk] if needs.teacher_is_student else run.train_step.teachers.models[run.phase.teacher_of(objective)]
    with torch.no_grad():
        taps = needs.teacher_taps(4)
        _, targets = teacher(batch.tokens, batch.teacher_positions, taps)
    output, values = chunk(batch.tokens, batch.student_positions, needs.pairs)
    chunk_terms(chunk, teacher, batch, needs, output, values, targets, run.groups)
    return handed


def test_a_head_is_there_where_it_is_needed(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    [(student, teacher)] = terms_of(run, "packed_distillation", monkeypatch)
    assert student.head and student.head.weight is run.chunks[0].head_weight() and student.taps == {}
    assert teacher.head and teacher.head.hidden.shape == student.head.hidden.shape
    [(student, teacher)] = terms_of(run, "relations", monkeypatch)
    assert student.head is None and teacher.head is None
    assert student.taps.keys() == teacher.taps.keys() == run.phase.needs["relations"].pairs.keys()


def test_the_students_own_view_has_no_gradient(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    [(student, teacher)] = terms_of(run, "perturbed_positions", monkeypatch)
    assert student.head and teacher.head
    assert student.head.weight.requires_grad and student.head.hidden.requires_grad
    assert not teacher.head.weight.requires_grad and not teacher.head.hidden.requires_grad
    assert teacher.head.weight.data_ptr() == student.head.weight.data_ptr()


def test_a_chunk_that_is_not_the_last_has_no_head(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.chunks[0], "post_process", False)
    batch = next(m for m in run.data.step(1, 0, 1) if m.objective == "packed_distillation")
    output, _ = run.chunks[0](batch.tokens, batch.student_positions)
    needs = run.phase.needs["packed_distillation"]
    assert chunk_terms(run.chunks[0], None, batch, needs, output, {}, {}, run.groups) == []
