"""Every kind of objective in a few lines of plain torch on transformers' models: what the tests compare with.

A new kind adds a function here; `tests/objectives/test_kinds.py` says so when it is missing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div, log_softmax, scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longred_megatron.kernels.drawn_entries import BELOW_ONE
from longred_megatron.training.microbatches import MicroBatch
from longred_megatron.training.run import PhaseRun


@dataclass
class View:
    """What a model computes of a micro-batch. Layers are counted from 1; heads come first: [n, heads, s, head_dim]."""

    logits: Tensor
    hidden: dict[int, Tensor]
    query: dict[int, Tensor] = field(default_factory=dict)
    key: dict[int, Tensor] = field(default_factory=dict)
    value: dict[int, Tensor] = field(default_factory=dict)
    attention_output: dict[int, Tensor] = field(default_factory=dict)

    def detached(self) -> "View":
        def without_graph(values: dict[int, Tensor]) -> dict[int, Tensor]:
            return {layer: value.detach() for layer, value in values.items()}

        rest = {name: without_graph(getattr(self, name)) for name in ("hidden", "query", "key", "value")}
        return View(self.logits.detach(), attention_output=without_graph(self.attention_output), **rest)


CAPTURED: list[tuple[Tensor, Tensor, Tensor]] = []  # of each layer of the forward pass that runs


def _capturing(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **rest: Any
) -> tuple[Tensor, None]:
    CAPTURED.append((query, key, value))
    grouped = query.shape[1] != key.shape[1]
    out = scaled_dot_product_attention(query, key, value, mask, scale=rest["scaling"], enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register("capturing", _capturing)


def load(hf: Any, **config_changes: Any) -> torch.nn.Module:
    """A model in fp32, with changes to its config."""
    source = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    config = AutoConfig.from_pretrained(hf)
    for key, value in config_changes.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="capturing")
    model.load_state_dict(source.state_dict())
    return model


def extended_student(run: PhaseRun) -> torch.nn.Module:
    """The model of model.hf with the recipe's RoPE and window."""
    window = run.student.max_position_embeddings
    return load(run.phase.recipe.model.hf, rope_parameters=run.student.rope, max_position_embeddings=window)


def view(model: torch.nn.Module, batch: MicroBatch, positions: Tensor) -> View:
    """Runs `model`; tokens see those before them, where documents are told apart only of their own document."""
    num_sequences, length = batch.tokens.shape
    mask = torch.ones(length, length, dtype=torch.bool).tril().expand(num_sequences, 1, -1, -1)
    if batch.documents is not None:
        numbers = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in batch.documents])
        mask = mask & (numbers[:, :, None] == numbers[:, None, :])[:, None]
    CAPTURED.clear()
    attended: list[Tensor] = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda module, args, out: attended.append(out[0]))
        for layer in model.model.layers
    ]
    out = model(batch.tokens, position_ids=positions, attention_mask=mask, output_hidden_states=True, use_cache=False)
    for hook in hooks:
        hook.remove()
    heads = [dict(enumerate(values, start=1)) for values in zip(*CAPTURED, strict=True)]
    hidden = dict(enumerate(out.hidden_states))
    return View(out.logits, hidden, *heads, attention_output=dict(enumerate(attended, start=1)))


def short_restoration(student: View, teacher: View, batch: MicroBatch) -> Tensor:
    ours, theirs = (getattr(each, batch.settings.states) for each in (student, teacher))
    return sum((1 - cosine_similarity(ours[k], theirs[k], dim=-1)).mean() for k in batch.settings.layers)


def short_to_long(student: View, teacher: View, batch: MicroBatch) -> Tensor:
    ours, theirs = (each.hidden[max(each.hidden)] for each in (student, teacher))
    return (1 - cosine_similarity(ours, theirs, dim=-1)).mean()


def next_token(student: View, teacher: View | None, batch: MicroBatch) -> Tensor:
    return cross_entropy(student.logits.flatten(0, 1), batch.labels.flatten())


def packed_distillation(student: View, teacher: View | None, batch: MicroBatch) -> Tensor:
    """Mean over the labelled tokens of (1 - c) t^2 D(teacher, student) + c CE, on the student's vocabulary."""
    settings, has_loss = batch.settings, batch.labels != -100
    logits = student.logits[has_loss]
    loss = settings.cross_entropy * cross_entropy(logits, batch.labels[has_loss])
    if teacher is None:
        return loss
    target, t = teacher.logits[has_loss][:, : logits.shape[1]], settings.temperature
    log_q, log_p = log_softmax(logits / t, -1), log_softmax(target / t, -1)
    if settings.top_k:
        top = target.topk(settings.top_k).indices
        log_q, log_p = (_with_rest(each, top) for each in (log_q, log_p))
    if settings.draws:  # each is the first whose cumulated probability is above its uniform number
        below = log_p.exp().cumsum(1)[:, None] <= (batch.uniforms[has_loss] * BELOW_ONE)[..., None]
        drawn = below.sum(-1).clamp(max=logits.shape[1] - 1)
        estimate = (log_p.gather(1, drawn) - log_q.gather(1, drawn)).mean()
        return loss + (1 - settings.cross_entropy) * t**2 * estimate
    if settings.direction == "reverse":
        log_q, log_p = log_p, log_q
    divergence = kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return loss + (1 - settings.cross_entropy) * t**2 * divergence


def _with_rest(log_p: Tensor, top: Tensor) -> Tensor:
    rest = log_p.scatter(1, top, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([log_p.gather(1, top), rest], 1)


def perturbed_positions(student: View, teacher: View, batch: MicroBatch) -> Tensor:
    has_loss = batch.labels != -100
    ours, natural = (log_softmax(each.logits[has_loss], -1) for each in (student, teacher))
    return kl_div(natural, ours, log_target=True, reduction="batchmean")  # KL(ours || natural)


def relations(student: View, teacher: View, batch: MicroBatch) -> Tensor:
    def log_relations(x: Tensor) -> Tensor:
        future = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).triu(1)
        return (x @ x.transpose(2, 3) / math.sqrt(x.shape[3])).masked_fill(future, -1e30).log_softmax(-1)

    total = torch.zeros(())
    for layer in batch.settings.layers:
        for what in ("query", "key", "value"):
            ours, theirs = (log_relations(getattr(each, what)[layer]) for each in (student, teacher))
            total = total + (theirs.exp() * (theirs - ours)).sum(-1).mean()
    return total / len(batch.settings.layers)


Reference = Callable[[View, Any, MicroBatch], Tensor]
REFERENCES: dict[str, Reference] = {
    "short_restoration": short_restoration,
    "short_to_long": short_to_long,
    "next_token": next_token,
    "long_text": next_token,
    "packed_distillation": packed_distillation,
    "perturbed_positions": perturbed_positions,
    "relations": relations,
}


def step_loss(run: PhaseRun, microbatches: list[MicroBatch]) -> tuple[Tensor, dict[str, Tensor]]:
    """The step loss of one replica, and its gradients by Hugging Face name."""
    student = extended_student(run)
    teachers = {hf: load(hf) for hf in run.phase.teachers}
    total = torch.zeros(())
    for m in microbatches:
        needs, teacher = run.phase.needs[m.objective], None
        if needs.teacher:
            model = student if needs.teacher_is_student else teachers[run.phase.teacher_of(m.objective)]
            teacher = view(model, m, m.teacher_positions).detached()
        loss = REFERENCES[m.settings.kind](view(student, m, m.student_positions), teacher, m)
        total = total + m.settings.weight * loss / len(microbatches)
    total.backward()
    return total.detach(), {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
