"""Which of Transformer Engine's attention backends the objectives of a phase take, asked before anything starts."""

import math
import os
from dataclasses import dataclass
from typing import Any

from longred_megatron.dtypes import DTYPES
from longred_megatron.errors import UserError, listed
from longred_megatron.families import Architecture
from longred_megatron.model.megatron_config import transformer_config
from longred_megatron.objectives.base import Objective
from longred_megatron.precision import Precision
from longred_megatron.recipe import Phase

# What Megatron sets when it builds a model with `attention_backend=fused`, and insists on.
ENVIRONMENT = {"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "1", "NVTE_UNFUSED_ATTN": "0"}


@dataclass(frozen=True)
class Choice:
    """What attention is called with by an objective, and the backend that takes it; None: none does."""

    objective: str
    call: str
    backend: str | None

    def __str__(self) -> str:
        return f"{self.objective}, {self.call}: {self.backend}"


def attention_choices(phase: Phase) -> list[Choice]:
    """Of each objective's training and of its teacher's pass, on this process's GPU.

    Raises:
        UserError: the environment asks for another backend than cuDNN's fused one.
    """
    others = [
        f"{name}={os.environ[name]}" for name, value in ENVIRONMENT.items() if os.environ.get(name, value) != value
    ]
    if others:
        raise UserError(f"the environment has {listed(others)}: only cuDNN's fused attention is used; unset it")
    os.environ.update(ENVIRONMENT)
    precision, found = phase.recipe.precision, []
    for name, objective in phase.recipe.objectives.items():
        needs, site = phase.needs[name], phase.sites[name]
        calls = [("student", site.student, precision, True)]
        if needs.teacher and not needs.teacher_is_student:
            calls.append(("teacher", site.teacher, precision.of_teacher(), False))
        for who, model, own, training in calls:
            how, settings = _call(objective, phase, model)
            backend = _backend(settings, model, phase, own, training)
            found.append(Choice(name, f"{who} on {how}{', attention in FP8' if own.fp8_attention else ''}", backend))
    return found


def attention_problems(choices: list[Choice]) -> list[str]:
    """A sentence for each call that no backend takes."""
    return [
        f"`objectives.{choice.objective}`: Transformer Engine has no fused attention here for the {choice.call}; "
        "NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 makes it print why. Its unfused one, which holds heads x length x length "
        "numbers, is off"
        for choice in choices
        if choice.backend is None
    ]


def _call(objective: Objective, phase: Phase, model: Architecture) -> tuple[str, dict[str, Any]]:
    """What a rank's attention is called with: in words, and in Transformer Engine's (see `model/attention.py`)."""
    parallel, length = phase.recipe.parallel, objective.sequence_length
    cut = parallel.context > 1 and not objective.whole_sequences
    tokens = phase.recipe.step.tokens_per_microbatch
    rank_tokens = tokens // parallel.context
    sequences = tokens // length if cut else rank_tokens // length
    over = f" cut over {parallel.context} ranks" if cut else ""
    settings: dict[str, Any] = {
        "num_heads": model.num_attention_heads // parallel.tensor,
        "num_gqa_groups": model.num_kv_heads // parallel.tensor,
        "head_dim_qk": model.head_dim,
        "head_dim_v": model.head_dim,
        "batch_size": sequences,
    }
    if objective.masks_documents():
        num_keys = tokens if cut else rank_tokens
        return f"documents of {sequences} x {length:,} tokens{over}", settings | {
            "qkv_layout": "thd_thd_thd",
            "attn_mask_type": "padding_causal_bottom_right" if cut else "padding_causal",
            "max_seqlen_q": min(length, rank_tokens),
            "max_seqlen_kv": length,
            "num_tokens_q": rank_tokens,
            "num_tokens_kv": num_keys,
        }
    return f"{sequences} x {length:,} tokens{over}", settings | {
        "qkv_layout": "bshd_bshd_bshd",
        "attn_mask_type": "causal",
        "max_seqlen_q": length,
        "max_seqlen_kv": length,
        "context_parallel": cut,
        "cp_size": parallel.context if cut else 1,
    }


def _backend(
    settings: dict[str, Any], model: Architecture, phase: Phase, precision: Precision, training: bool
) -> str | None:
    from megatron.core.fp8_utils import get_fp8_recipe
    from transformer_engine.pytorch.attention.dot_product_attention.utils import AttentionParams, get_attention_backend

    fp8: dict[str, Any] = {}
    if precision.fp8 is not None:
        parallel = phase.recipe.parallel.for_depth(model.num_layers)
        recipe = get_fp8_recipe(transformer_config(model, parallel, precision))
        fp8 = {"fp8": True, "fp8_meta": {"recipe": recipe, "local_recipes": [recipe]}}
    _, _, fused, _, unfused, _ = get_attention_backend(
        AttentionParams(
            **settings,
            **fp8,
            qkv_dtype=DTYPES[precision.params],
            is_training=training,
            softmax_scale=1 / math.sqrt(model.head_dim),
        )
    )
    return "cuDNN's fused attention" if fused else "unfused, with all scores in memory" if unfused else None
