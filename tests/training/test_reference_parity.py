"""Every objective's loss and every gradient against the papers' equations in plain transformers and torch."""

from pathlib import Path

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import AutoModelForCausalLM

from longred_megatron.checkpoint import huggingface
from longred_megatron.objectives.base import Term
from longred_megatron.recipe import load_recipe, read_phases
from longred_megatron.training.microbatches import MicroBatch
from longred_megatron.training.run import PhaseRun, extended_architecture
from tests.training.workspace import build_run, make_workspace

OBJECTIVES = ("long_text", "short_to_long", "short_restoration")
# Each family once, and between them: tied and untied, biases, q/k norm, scaled RoPE of the source.
SCALED = ("llama_yarn", "llama_dynamic", "llama_longrope")
CASES = ("llama_3", "llama_3_2", "llama_biases", *SCALED, "mistral", "qwen2", "qwen3_tied", "phi3")


def megatron_gradients(run: PhaseRun) -> dict[str, Tensor]:
    """Gradients by Hugging Face name: each takes the place of its parameter, then the exporter renames them."""
    for chunk in run.chunks:
        for parameter in chunk.parameters():
            parameter.data = parameter.main_grad.clone()
    tensors = huggingface.full_tensors(run.chunks, run.student, run.groups)
    return {name: tensor for named in tensors for name, tensor in named.items()}


def extended_student(run: PhaseRun) -> torch.nn.Module:
    """The model of model.hf with the recipe's RoPE and window, in transformers."""
    source = AutoModelForCausalLM.from_pretrained(run.phase.recipe.model.hf, dtype=torch.float32)
    config = source.config
    config.rope_parameters = run.student.rope
    config.max_position_embeddings = run.student.max_position_embeddings
    extended = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    extended.load_state_dict(source.state_dict())
    return extended


def reference(run: PhaseRun, microbatches: list[MicroBatch]) -> tuple[Tensor, dict[str, Tensor]]:
    """DESIGN's step loss on one replica, and its gradients, with Hugging Face models."""
    student = extended_student(run)
    teacher = AutoModelForCausalLM.from_pretrained(run.phase.recipe.teacher.hf, dtype=torch.float32)
    total = torch.zeros(())
    for m in microbatches:
        for model in (student, teacher):  # transformers' dynamic NTK remembers the longest call so far
            model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        out = student(m.tokens, position_ids=m.student_positions, output_hidden_states=True)
        if m.objective == "long_text":
            loss = cross_entropy(out.logits.flatten(0, 1), m.labels.flatten())
        else:
            with torch.no_grad():
                target = teacher(m.tokens, position_ids=m.teacher_positions, output_hidden_states=True)
            loss = torch.stack(
                [
                    (1 - cosine_similarity(out.hidden_states[k], target.hidden_states[k], dim=-1)).mean()
                    for k in getattr(m.settings, "layers", [-1])
                ]
            ).sum()
        total = total + m.settings.weight * loss / len(microbatches)
    total.backward()
    return total.detach(), {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


def total_loss(microbatches: list[MicroBatch], terms: list[list[Term]]) -> Tensor:
    """The step loss of one process."""
    each = zip(microbatches, terms, strict=True)
    return torch.stack([m.settings.weight * term.share for m, own in each for term in own]).sum() / len(microbatches)


def assert_same(run: PhaseRun, microbatches: list[MicroBatch]) -> None:
    expected_loss, expected = reference(run, microbatches)
    loss = total_loss(microbatches, run.train_step.forward_backward(microbatches)[0])
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    gradients = megatron_gradients(run)
    assert expected.keys() <= gradients.keys()
    for name, gradient in gradients.items():
        wanted = expected.get(name, torch.zeros_like(gradient))
        # Relative to the tensor's norm: single elements near zero are sums of cancelling terms.
        assert (gradient - wanted).norm() <= 1e-5 * wanted.norm() + 1e-9, name


@pytest.mark.parametrize("model", CASES)
def test_step_equals_plain_torch(model: str, tmp_path: Path, groups: ProcessGroupCollection) -> None:
    unchanged = ("model.rope=none",) if model in SCALED else ()
    run = build_run(make_workspace(tmp_path, model), groups, *unchanged)
    assert_same(run, run.data.step(1, 0, 1))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_each_objective_alone(objective: str, recompute: str, tmp_path: Path, groups: ProcessGroupCollection) -> None:
    others = [f"objectives.{name}=null" for name in OBJECTIVES if name != objective]
    run = build_run(make_workspace(tmp_path), groups, *others, f"training.recompute={recompute}")
    assert_same(run, run.data.step(1, 0, 1))


METHODS = (
    "{method: pi, factor: 4}",
    "{method: yarn, factor: 4}",
    "dynamic",
    "{method: longrope, short_factor: [1.0, 1.1, 1.2, 1.3], long_factor: [1.0, 1.5, 3.0, 4.0]}",
)


@pytest.mark.parametrize("method", METHODS)
def test_rope_scaling_of_the_student(method: str, tmp_path: Path, groups: ProcessGroupCollection) -> None:
    run = build_run(make_workspace(tmp_path), groups, f"model.rope={method}")
    assert_same(run, run.data.step(1, 0, 1))


def test_the_teacher_computes_only_what_a_loss_needs(tmp_path: Path, groups: ProcessGroupCollection) -> None:
    overrides = ("objectives.short_to_long=null", "objectives.short_restoration.layers=[1]")
    run = build_run(make_workspace(tmp_path), groups, *overrides)
    [teacher] = run.train_step.teachers.models.values()
    names = [name for chunk in teacher for name, _ in chunk.named_parameters()]
    assert not any(part in name for name in names for part in ("layers.1", "layers.2", "output_layer"))
    assert_same(run, run.data.step(1, 0, 1))


def test_gradients_do_not_depend_on_the_order_of_micro_batches(tmp_path: Path, groups: ProcessGroupCollection) -> None:
    run = build_run(make_workspace(tmp_path), groups)
    assert_same(run, run.data.step(1, 0, 1)[::-1])


def test_extended_architecture_keeps_all_but_rope_and_window(tmp_path: Path) -> None:
    [phase] = read_phases(load_recipe(make_workspace(tmp_path)))
    source, extended = phase.source, extended_architecture(phase)
    assert extended.rope == source.rope | {"rope_theta": 1e6}
    assert extended.max_position_embeddings == 256
    assert (extended.hidden_size, extended.vocab_size) == (source.hidden_size, source.vocab_size)
