"""Floating-point operations a training step needs, for model FLOPs utilization."""

from longred_megatron.recipe import Architecture, Recipe
from longred_megatron.training.order import TOKEN_OBJECTIVES


def forward_flops_per_token(architecture: Architecture, depth: int, sequence_length: int, head: bool) -> float:
    """Two per multiply-add; causal attention sees half of the sequence on average.

    Args:
        depth: layers that run; head: whether the language-model head runs.
    """
    a = architecture
    query, kv = a.num_attention_heads * a.head_dim, a.num_kv_heads * a.head_dim
    matrices = a.hidden_size * (2 * query + 2 * kv + 3 * a.intermediate_size)
    attention = 2 * query * sequence_length / 2  # scores and weighted values
    return 2 * (depth * (matrices + attention) + head * a.hidden_size * a.vocab_size)


def step_flops(recipe: Recipe, student: Architecture, teacher: Architecture | None, teacher_depth: int) -> float:
    """Of one optimizer step over all ranks: the student's forward and backward (twice the forward), the teacher's
    forward. Recomputed activations do not count: they are a choice, not part of the model."""
    total = 0.0
    for name, objective in recipe.objectives.items():
        head, length = name in TOKEN_OBJECTIVES, objective.sequence_length
        per_token = 3 * forward_flops_per_token(student, student.num_layers, length, head)
        if teacher is not None and objective.needs_teacher:
            per_token += forward_flops_per_token(teacher, teacher_depth, length, head)
        total += objective.microbatches * recipe.step.tokens_per_microbatch * per_token
    return total
