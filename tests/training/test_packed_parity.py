"""`packed_distillation`: loss and every gradient against plain transformers and torch, with any teacher."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div, log_softmax
from transformers import AutoModelForCausalLM

from longred_megatron.training.microbatches import MicroBatch
from longred_megatron.training.run import PhaseRun
from tests.checkpoint.small_models import write_model
from tests.training.test_reference_parity import extended_student, megatron_gradients, total_loss
from tests.training.workspace import build_run, make_workspace

# Another width, depth, number of heads, RoPE, window, and a vocabulary padded further: all but the tokenizer.
LARGE = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 6, "num_attention_heads": 6}
LARGE |= {"num_key_value_heads": 3, "head_dim": 8, "max_position_embeddings": 256, "vocab_size": 110}
PACKED: dict[str, Any] = {"microbatches": 2, "sequence_length": 128, "data": "texts"}
ALONE = ("objectives.long_text=null", "objectives.short_to_long=null", "objectives.short_restoration=null")


def make_packed(folder: Path, model: str = "llama_3", **settings: Any) -> Path:
    """A workspace with `packed_distillation` beside the other objectives, and a large teacher in `large`."""
    recipe = make_workspace(folder, model, objectives={"packed_distillation": PACKED | settings})
    write_model("qwen3_tied", folder / "large", sizes=LARGE)
    return recipe


def reference_loss(run: PhaseRun, batch: MicroBatch, student: torch.nn.Module, teacher: torch.nn.Module) -> Tensor:
    """Mean over the labelled tokens of (1 - c) t^2 KL(teacher || student) + c CE, on logits of the real vocabulary."""
    settings = batch.settings
    mask = None
    if settings.mask_documents:
        rows = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in batch.documents]
        numbers = torch.stack(rows)
        causal = torch.ones(numbers.shape[1], numbers.shape[1], dtype=torch.bool).tril()
        mask = ((numbers[:, :, None] == numbers[:, None, :]) & causal)[:, None]
    has_loss, vocab = batch.labels != -100, run.phase.source.vocab_size
    logits = student(batch.tokens, position_ids=batch.student_positions, attention_mask=mask).logits[has_loss]
    loss = settings.cross_entropy * cross_entropy(logits, batch.labels[has_loss])
    if batch.teacher_positions is None:
        return loss
    with torch.no_grad():
        target = teacher(batch.tokens, position_ids=batch.teacher_positions, attention_mask=mask).logits[has_loss]
    t = settings.temperature
    log_q, log_p = log_softmax(logits / t, -1), log_softmax(target[:, :vocab] / t, -1)
    if settings.direction == "reverse":
        log_q, log_p = log_p, log_q
    divergence = kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return loss + (1 - settings.cross_entropy) * t**2 * divergence


def assert_same(run: PhaseRun) -> None:
    """All micro-batches of a step: `packed_distillation`, and `short_restoration` where it is beside."""
    batches = run.data.step(1, 0, 1)
    student = extended_student(run)
    teacher = AutoModelForCausalLM.from_pretrained(run.phase.recipe.teacher.hf, dtype=torch.float32)
    total = torch.zeros(())
    for m in batches:
        if m.objective == "packed_distillation":
            loss = reference_loss(run, m, student, teacher)
        else:
            states, target = (
                model(m.tokens, position_ids=positions, output_hidden_states=True).hidden_states
                for model, positions in ((student, m.student_positions), (teacher, m.teacher_positions))
            )
            pairs = [(states[k], target[k].detach()) for k in m.settings.layers]
            loss = torch.stack([(1 - cosine_similarity(a, b, dim=-1)).mean() for a, b in pairs]).sum()
        total = total + m.settings.weight * loss / len(batches)
    total.backward()
    ours = total_loss(batches, run.train_step.forward_backward(batches)[0])
    torch.testing.assert_close(ours, total.detach(), rtol=1e-5, atol=0)
    gradients = megatron_gradients(run)
    for name, parameter in student.named_parameters():
        wanted = parameter.grad
        assert (gradients[name] - wanted).norm() <= 1e-5 * wanted.norm() + 1e-9, name


@pytest.mark.parametrize("model", ["llama_3", "llama_3_2", "qwen2", "qwen3_tied"])
def test_a_teacher_of_another_width_depth_heads_rope_and_vocabulary_padding(model, tmp_path, groups):
    run = build_run(make_packed(tmp_path, model), groups, *ALONE, f"teacher.hf={tmp_path / 'large'}")
    [large] = run.phase.teachers.values()
    assert large.hidden_size != run.student.hidden_size and large.num_layers != run.student.num_layers
    assert_same(run)


@pytest.mark.parametrize("mask_documents", [False, True])
@pytest.mark.parametrize("restart_positions", [False, True])
def test_documents_and_positions_of_a_pack(mask_documents, restart_positions, tmp_path, groups):
    settings = {"mask_documents": mask_documents, "restart_positions": restart_positions}
    run = build_run(make_packed(tmp_path, **settings), groups, *ALONE, f"teacher.hf={tmp_path / 'large'}")
    assert_same(run)


@pytest.mark.parametrize(
    "settings",
    [
        {"direction": "reverse", "temperature": 2.0},
        {"cross_entropy": 0.25, "temperature": 0.5},
        {"cross_entropy": 1.0},
    ],
)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_settings_of_the_loss(settings, recompute, tmp_path, groups):
    teacher = () if settings.get("cross_entropy") == 1 else (f"teacher.hf={tmp_path / 'large'}",)
    run = build_run(make_packed(tmp_path, **settings), groups, *ALONE, *teacher, f"training.recompute={recompute}")
    assert bool(run.train_step.teachers.models) == bool(teacher)
    assert_same(run)


def test_beside_restoration_in_one_step(tmp_path, groups):
    others = ("objectives.long_text=null", "objectives.short_to_long=null", "objectives.packed_distillation.weight=2")
    recipe = make_packed(tmp_path, sequence_length=64)
    run = build_run(recipe, groups, *others)
    assert {m.objective for m in run.data.step(1, 0, 1)} == {"short_restoration", "packed_distillation"}
    assert_same(run)


def test_documents_that_see_only_themselves_are_computed_as_if_alone(tmp_path, groups):
    """Masked, with positions that restart: the loss is the one of every document by itself."""
    settings = {"mask_documents": True, "restart_positions": True}
    run = build_run(make_packed(tmp_path, **settings), groups, *ALONE, f"teacher.hf={tmp_path / 'large'}")
    student = extended_student(run)
    teacher = AutoModelForCausalLM.from_pretrained(run.phase.recipe.teacher.hf, dtype=torch.float32)
    (batch, *_) = run.data.step(1, 0, 1)
    total = 0.0
    for row, lengths in enumerate(batch.documents):
        for tokens, labels in zip(batch.tokens[row].split(lengths), batch.labels[row].split(lengths), strict=True):
            if (labels == -100).all():  # padding, or one token
                continue
            with torch.no_grad():
                log_q, log_p = (log_softmax(m(tokens[None]).logits[0, :-1, :101], -1) for m in (student, teacher))
            total += float(kl_div(log_q, log_p, log_target=True, reduction="sum"))
    [[term]], _ = run.train_step.forward_backward([batch])
    assert float(term.share) == pytest.approx(total / batch.num_valid_tokens, rel=1e-5)


def test_a_teacher_of_another_depth_gives_its_last_state_to_short_to_long(tmp_path, groups):
    make_packed(tmp_path)
    sizes = {"num_hidden_layers": 6, "max_position_embeddings": 64}
    write_model("llama_3", tmp_path / "deep", sizes=sizes)
    others = ("objectives.long_text=null", "objectives.short_restoration=null", "objectives.packed_distillation=null")
    run = build_run(tmp_path / "recipe.yaml", groups, *others, f"teacher.hf={tmp_path / 'deep'}")
    (batch, *_) = run.data.step(1, 0, 1)
    models = extended_student(run), AutoModelForCausalLM.from_pretrained(tmp_path / "deep", dtype=torch.float32)
    with torch.no_grad():
        ours, theirs = (
            model(batch.tokens, position_ids=positions, output_hidden_states=True).hidden_states[-1]
            for model, positions in zip(models, (batch.student_positions, batch.teacher_positions), strict=True)
        )
    [[term]], _ = run.train_step.forward_backward([batch])
    expected = float((1 - cosine_similarity(ours, theirs, dim=-1)).mean())
    assert float(term.share) == pytest.approx(expected, rel=1e-5)
