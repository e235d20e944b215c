"""What runs in a step: which teacher on which micro-batch, and what is kept of it for how long."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.multiprocessing.reductions import StorageWeakRef

from longred_megatron.objectives import KINDS
from longred_megatron.objectives.base import Tap
from longred_megatron.training import losses, stopwatch
from tests.objectives.examples import example
from tests.objectives.references import step_loss
from tests.training.test_reference_parity import megatron_gradients, total_loss
from tests.training.workspace import build_run, make_workspace, write_perturbed, write_recipe

Calls = list[tuple[Any, int, set[Tap]]]


@pytest.fixture
def two_teachers(tmp_path: Path) -> Path:
    """One objective has a teacher of its own, another kind none, a third is its own."""
    make_workspace(tmp_path)
    write_perturbed(tmp_path / "model", tmp_path / "other", seed=12)
    first = example(KINDS["short_restoration"], 4, layers=[1, 2])
    second = example(KINDS["short_restoration"], 4, layers=[2, 4], teacher={"hf": "other"}, sequence_length=16)
    objectives = {"first": first, "second": second, "text": example(KINDS["next_token"], 4)}
    return write_recipe(tmp_path, objectives=objectives | {"own": example(KINDS["perturbed_positions"], 4)})


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Calls]:
    """A function that lists the forward passes of a run's models: the model, its sequence length, what it gave."""

    def watch(run: Any) -> Calls:
        calls: Calls = []
        chunks = [chunk for each in (run.chunks, *run.train_step.teachers.models.values()) for chunk in each]
        for chunk in chunks:
            chunk.register_forward_hook(
                lambda module, arguments, result: calls.append((module, arguments[0].shape[1], set(result[1])))
            )
        return calls

    return watch


def test_each_objective_has_its_own_teacher(two_teachers: Path, groups: ProcessGroupCollection) -> None:
    run = build_run(two_teachers, groups)
    microbatches = run.data.step(1, 0, 1)
    expected_loss, expected = step_loss(run, microbatches)
    loss = total_loss(microbatches, run.train_step.forward_backward(microbatches)[0])
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    for name, gradient in megatron_gradients(run).items():
        wanted = expected.get(name, torch.zeros_like(gradient))
        assert (gradient - wanted).norm() <= 1e-5 * wanted.norm() + 1e-9, name


def test_models_run_where_a_loss_needs_them(
    two_teachers: Path, groups: ProcessGroupCollection, watched: Callable[[Any], Calls]
) -> None:
    run = build_run(two_teachers, groups)
    calls = watched(run)
    run.train_step.forward_backward(run.data.step(1, 0, 1))
    teacher, other = (chunks[0] for chunks in run.train_step.teachers.models.values())
    assert [taps for model, _, taps in calls if model is teacher] == 2 * [{Tap(1), Tap(2)}]
    assert list(teacher.layer_numbers()) == [1, 2]  # no layer above the deepest compared one
    assert [(length, taps) for model, length, taps in calls if model is other] == 2 * [(16, {Tap(2), Tap(4)})]
    # Two micro-batches of each of four objectives, and the natural view of the one that is its own teacher.
    assert sum(model is run.chunks[0] for model, _, _ in calls) == 4 * 2 + 2


def test_heads_are_computed_for_losses_that_need_them(
    two_teachers: Path, groups: ProcessGroupCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build_run(two_teachers, groups)
    made: list[bool] = []
    head = losses.head
    monkeypatch.setattr(losses, "head", lambda *a: made.append(a[1].requires_grad) or head(*a))
    run.train_step.forward_backward(run.data.step(1, 0, 1))
    assert (made.count(True), made.count(False)) == (4, 2)  # the student's of two kinds; its own view's


def test_what_a_teacher_gave_is_dropped_before_the_next_one_is_asked(
    two_teachers: Path, groups: ProcessGroupCollection
) -> None:
    run = build_run(two_teachers, groups)
    given: list[list[StorageWeakRef]] = []
    living: list[int] = []  # micro-batches whose targets are held, whenever a teacher runs

    def watch(module: Any, arguments: Any, result: Any) -> None:
        if not torch.is_grad_enabled():  # a teacher, or the student as its own
            living.append(sum(any(not each.expired() for each in values) for values in given))
            given.append([StorageWeakRef(value.untyped_storage()) for value in result[1].values()])

    for chunks in (run.chunks, *run.train_step.teachers.models.values()):
        chunks[0].register_forward_hook(watch)
    run.train_step.forward_backward(run.data.step(1, 0, 1))
    assert living == 6 * [0]
    assert all(each.expired() for values in given for each in values)


def test_the_seconds_of_teachers_are_those_of_every_micro_batch(
    two_teachers: Path, groups: ProcessGroupCollection
) -> None:
    run = build_run(two_teachers, groups)
    for chunks in run.train_step.teachers.models.values():
        chunks[0].register_forward_hook(lambda *_: time.sleep(0.05))
    run.chunks[0].register_forward_hook(lambda *_: time.sleep(0.3 * torch.is_grad_enabled()))
    assert 4 * 0.05 < run.train_step(run.data.step(1, 0, 1)).teacher_seconds < 8 * 0.3


def test_on_a_gpu_seconds_are_read_from_events(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1000.0, 1500.0, 4000.0, 4250.0])  # milliseconds, as CUDA has them

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = next(clock)

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    monkeypatch.setattr(stopwatch, "on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = stopwatch.Stopwatch()
    for _ in range(2):
        with watch.running():
            pass
    assert watch.seconds() == 0.75


def test_a_teacher_leaves_the_student_and_its_gradients_alone(
    two_teachers: Path, groups: ProcessGroupCollection
) -> None:
    run = build_run(two_teachers, groups)
    teachers = [p.clone() for chunks in run.train_step.teachers.models.values() for c in chunks for p in c.parameters()]
    run.train_step(run.data.step(1, 0, 1))
    after = [p for chunks in run.train_step.teachers.models.values() for c in chunks for p in c.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(teachers, after, strict=True))
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in after}
