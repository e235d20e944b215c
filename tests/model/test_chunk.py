"""One model chunk: which layers, which head, and what a frozen embedding leaves to the layers."""

from collections import Counter
from pathlib import Path

import pytest
from megatron.core.process_groups_config import ProcessGroupCollection

from longred_megatron.objectives.base import Tap
from tests.training.workspace import build_run, make_workspace


def test_a_truncated_teacher_has_no_layer_above_and_no_head(tmp_path: Path, groups: ProcessGroupCollection) -> None:
    overrides = ("objectives.short_to_long=null", "objectives.short_restoration.layers=[1, 2]")
    run = build_run(make_workspace(tmp_path), groups, *overrides)
    [[teacher]] = run.train_step.teachers.models.values()
    assert list(teacher.layer_numbers()) == [1, 2]
    assert not hasattr(teacher, "output_layer")
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    batch, *_ = run.data.step(1, 0, 1)
    _, values = teacher(batch.tokens, batch.teacher_positions, [Tap(1), Tap(2), Tap(3)])
    assert values.keys() == {Tap(1), Tap(2)}


@pytest.mark.parametrize("model", ["llama_3", "llama_3_2"])
def test_the_head_is_the_embedding_where_they_are_tied(
    model: str, tmp_path: Path, groups: ProcessGroupCollection
) -> None:
    chunk = build_run(make_workspace(tmp_path, model), groups).chunks[0]
    tied = chunk.head_weight() is chunk.embedding.word_embeddings.weight
    assert tied == chunk.architecture.tied_embeddings


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_layers_learn_above_a_frozen_embedding(recompute: str, tmp_path: Path, groups: ProcessGroupCollection) -> None:
    """Recomputed layers get no gradient behind an input that asks for none."""
    run = build_run(make_workspace(tmp_path), groups, f"training.recompute={recompute}")
    chunk = run.chunks[0]
    chunk.embedding.requires_grad_(False)
    batch, *_ = run.data.step(1, 0, 1)
    output, _ = chunk(batch.tokens, batch.student_positions)
    output.square().sum().backward()
    layers = dict(chunk.decoder.named_parameters())
    assert layers and all(p.grad is not None or p.main_grad.abs().sum() > 0 for p in layers.values())
    assert chunk.embedding.word_embeddings.weight.grad is None


def test_selective_recomputation_is_of_the_mlps(tmp_path: Path, groups: ProcessGroupCollection) -> None:
    """Attention's kernels keep no scores: to run them again would cost time and save nothing."""
    run = build_run(make_workspace(tmp_path), groups, "training.recompute=selective")
    calls: Counter[str] = Counter()
    for layer in run.chunks[0].decoder.layers:
        layer.mlp.linear_fc1.register_forward_hook(lambda *_: calls.update(["mlp"]))
        layer.self_attention.core_attention.register_forward_hook(lambda *_: calls.update(["attention"]))
    batch, *_ = run.data.step(1, 0, 1)
    output, _ = run.chunks[0](batch.tokens, batch.student_positions)
    output.square().sum().backward()
    assert calls == {"mlp": 2 * run.student.num_layers, "attention": run.student.num_layers}
