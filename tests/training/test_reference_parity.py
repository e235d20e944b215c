"""Every objective's loss and every gradient against the papers' equations in plain transformers and torch."""

from pathlib import Path

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import AutoModelForCausalLM

from longred_megatron.checkpoint import huggingface
from longred_megatron.recipe import load_recipe, read_architecture
from longred_megatron.training.microbatches import MicroBatch
from longred_megatron.training.run import Run, extended_architecture
from longred_megatron.training.step import compared_layers
from tests.checkpoint.small_models import ONE_OF_EACH_FAMILY
from tests.training.workspace import build_run, make_workspace

OBJECTIVES = ("long_text", "short_to_long", "short_restoration")
# Between them: tied and untied, biases, q/k norm, llama3 and yarn scaling.
CASES = (*ONE_OF_EACH_FAMILY, "llama_3", "llama_3_2", "llama_biases", "llama_yarn", "qwen3_tied")


def megatron_gradients(run: Run) -> dict[str, Tensor]:
    """Gradients by Hugging Face name: each takes the place of its parameter, then the exporter renames them."""
    for stage in run.stages:
        for parameter in stage.parameters():
            parameter.data = parameter.main_grad.clone()
    tensors = huggingface.full_tensors(run.stages, run.student, run.groups)
    return {name: tensor for named in tensors for name, tensor in named.items()}


def extended_student(run: Run) -> torch.nn.Module:
    """The model of model.hf with the recipe's RoPE and window, in transformers."""
    source = AutoModelForCausalLM.from_pretrained(run.recipe.model.hf, dtype=torch.float32)
    config = source.config
    config.rope_parameters = run.student.rope
    config.max_position_embeddings = run.student.max_position_embeddings
    extended = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    extended.load_state_dict(source.state_dict())
    return extended


def reference(run: Run, microbatches: list[MicroBatch]) -> tuple[Tensor, dict[str, Tensor]]:
    """DESIGN's step loss on one replica, and its gradients, with Hugging Face models."""
    student = extended_student(run)
    teacher = AutoModelForCausalLM.from_pretrained(run.recipe.teacher.hf, dtype=torch.float32)
    layers = compared_layers(run.recipe, run.source.num_layers, run.source.num_layers)
    total = torch.zeros(())
    for m in microbatches:
        out = student(m.tokens, position_ids=m.student_positions, output_hidden_states=True)
        if m.objective == "long_text":
            loss = cross_entropy(out.logits.flatten(0, 1), m.labels.flatten())
        else:
            with torch.no_grad():
                target = teacher(m.tokens, position_ids=m.teacher_positions, output_hidden_states=True)
            loss = torch.stack(
                [
                    (1 - cosine_similarity(out.hidden_states[k], target.hidden_states[k], dim=-1)).mean()
                    for k in layers[m.objective]
                ]
            ).sum()
        total = total + m.weight * loss / len(microbatches)
    total.backward()
    return total.detach(), {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


def assert_same(run: Run, microbatches: list[MicroBatch]) -> None:
    expected_loss, expected = reference(run, microbatches)
    losses, _ = run.train_step.forward_backward(microbatches)
    loss = sum(m.weight * sum(own.values()) / len(microbatches) for m, own in zip(microbatches, losses, strict=True))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    gradients = megatron_gradients(run)
    assert expected.keys() <= gradients.keys()
    for name, gradient in gradients.items():
        wanted = expected.get(name, torch.zeros_like(gradient))
        # Relative to the tensor's norm: single elements near zero are sums of cancelling terms.
        assert (gradient - wanted).norm() <= 1e-5 * wanted.norm() + 1e-9, name


@pytest.mark.parametrize("model", CASES)
def test_step_equals_plain_torch(model: str, tmp_path: Path, groups: ProcessGroupCollection) -> None:
    unchanged = ("model.rope=none",) if model == "llama_yarn" else ()  # the source is scaled already
    run = build_run(make_workspace(tmp_path, model), groups, *unchanged)
    assert_same(run, run.data.step(1, 0, 1))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_each_objective_alone(objective: str, recompute: str, tmp_path: Path, groups: ProcessGroupCollection) -> None:
    others = [f"objectives.{name}=null" for name in OBJECTIVES if name != objective]
    run = build_run(make_workspace(tmp_path), groups, *others, f"training.recompute={recompute}")
    assert_same(run, run.data.step(1, 0, 1))


@pytest.mark.parametrize("method", ["{method: pi, factor: 4}", "{method: yarn, factor: 4}"])
def test_rope_scaling_of_the_student(method: str, tmp_path: Path, groups: ProcessGroupCollection) -> None:
    run = build_run(make_workspace(tmp_path), groups, f"model.rope={method}")
    assert_same(run, run.data.step(1, 0, 1))


def test_the_teacher_computes_only_what_a_loss_needs(tmp_path: Path, groups: ProcessGroupCollection) -> None:
    overrides = ("objectives.short_to_long=null", "objectives.short_restoration.layers=[1]")
    run = build_run(make_workspace(tmp_path), groups, *overrides)
    names = [name for stage in run.train_step.teacher for name, _ in stage.named_parameters()]
    assert not any(part in name for name in names for part in ("layers.1", "layers.2", "output_layer"))
    assert_same(run, run.data.step(1, 0, 1))


def test_gradients_do_not_depend_on_the_order_of_micro_batches(tmp_path: Path, groups: ProcessGroupCollection) -> None:
    run = build_run(make_workspace(tmp_path), groups)
    assert_same(run, run.data.step(1, 0, 1)[::-1])


def test_extended_architecture_keeps_all_but_rope_and_window(tmp_path: Path) -> None:
    recipe = load_recipe(make_workspace(tmp_path))
    source = read_architecture(recipe.model.hf)
    extended = extended_architecture(recipe, source)
    assert extended.rope == source.rope | {"rope_theta": 1e6}
    assert extended.max_position_embeddings == 256
    assert (extended.hidden_size, extended.vocab_size) == (source.hidden_size, source.vocab_size)
