"""Floating-point operations a training step needs, for model FLOPs utilization."""

from longred_megatron.recipe import Architecture, Recipe
from longred_megatron.training.order import TOKEN_OBJECTIVES


def step_flops(recipe: Recipe, student: Architecture, teacher: Architecture | None, teacher_depth: int) -> float:
    """Of one optimizer step over all ranks: the student's forward and backward (twice the forward), the teacher's
    forward. Recomputed activations do not count: they are a choice, not part of the model."""
    total = 0.0
    for name, objective in recipe.objectives.items():
        head, length = name in TOKEN_OBJECTIVES, objective.sequence_length
        per_token = 3 * student.forward_flops_per_token(student.num_layers, length, head)
        if teacher is not None and objective.needs_teacher:
            per_token += teacher.forward_flops_per_token(teacher_depth, length, head)
        total += objective.microbatches * recipe.step.tokens_per_microbatch * per_token
    return total
