"""Plain Megatron-Core's training step: its GPTModel and layers, its logits, and eager losses of them."""

from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from longred_megatron.bench.base import Facts, Side
from longred_megatron.bench.inputs import phase_of
from longred_megatron.bench.plain import PlainBatch, read_microbatches
from longred_megatron.checkpoint.huggingface import load_weights
from longred_megatron.device import on_gpu
from longred_megatron.families import Architecture
from longred_megatron.kernels.linear_loss import NO_LABEL
from longred_megatron.layout import Parallel
from longred_megatron.model.megatron_config import transformer_config
from longred_megatron.parallel.groups import initialize
from longred_megatron.recipe import Phase
from longred_megatron.training.optimizer import build_optimizer, data_parallel, set_hyperparameters


class MegatronStep(Side):
    """A step of Megatron-Core's GPTModel on the micro-batches of a recipe with one objective, which are one sequence
    each: cross-entropy as GPTModel computes it, or KL(teacher || student) of the logits where there is a teacher.

    Megatron's data-parallel wrapper, distributed optimizer and schedule. Ours are the settings (TransformerConfig,
    number formats) and the weights' names.
    """

    def __init__(self, recipe: Path, microbatches: Path) -> None:
        phase = phase_of(recipe)
        groups = initialize(Parallel(), phase.recipe.training.seed)
        student = _model(phase, phase.recipe.model.hf, phase.source, groups)
        self._teachers = [_model(phase, hf, each, groups) for hf, each in phase.teachers.items()]
        for teacher in self._teachers:
            teacher.eval().requires_grad_(False)
        self._wrapped = data_parallel([student], groups, overlap=False)
        self._optimizer = build_optimizer(phase.recipe.optimizer, phase.recipe.precision, self._wrapped)
        set_hyperparameters(self._optimizer, phase.recipe.optimizer, 1, phase.recipe.training.steps)
        self._microbatches = list(read_microbatches(microbatches, torch.device(torch.cuda.current_device())))
        self._facts: Facts = {}

    def once(self) -> None:
        for chunk in self._wrapped:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=iter(self._microbatches),
            model=self._wrapped,
            num_microbatches=len(self._microbatches),
            seq_length=self._microbatches[0].tokens.shape[1],
            micro_batch_size=1,
            forward_only=False,
        )
        _, norm, _ = self._optimizer.step()
        self._facts = {"loss": float(torch.stack(losses).mean()), "grad_norm": float(norm)}

    def facts(self) -> Facts:
        return self._facts

    def _forward(self, batches: Any, model: Any) -> tuple[Tensor, Any]:
        """Megatron's forward step: the model's output, and what makes a loss of it."""
        batch: PlainBatch = next(batches)
        if not self._teachers:
            return model(batch.tokens, batch.student_positions, None, labels=batch.labels), _mean
        with torch.no_grad():
            target = self._teachers[0](batch.tokens, batch.teacher_positions, None)

        def divergence(logits: Tensor) -> tuple[Tensor, Tensor]:
            """Mean over the tokens with a label."""
            ours, theirs = (log_softmax(each.float(), -1) for each in (logits, target))
            of_tokens = kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
            loss = of_tokens[batch.labels != NO_LABEL].mean()
            return loss, loss.detach().clone()  # the schedule divides the loss itself by the micro-batches

        return model(batch.tokens, batch.student_positions, None), divergence


def _mean(losses: Tensor) -> tuple[Tensor, Tensor]:
    """Of the losses of all tokens."""
    loss = losses.mean()
    return loss, loss.detach().clone()  # the schedule divides the loss itself by the micro-batches


def _model(phase: Phase, hf: Path, architecture: Architecture, groups: ProcessGroupCollection) -> Any:
    """Megatron's own GPTModel with the weights of a folder."""
    local = get_gpt_layer_local_spec(normalization="RMSNorm")
    config = transformer_config(architecture, Parallel(), phase.recipe.precision)
    config.use_te_activation_func = False  # ours
    model: Any = GPTModel(
        config,
        get_gpt_layer_with_transformer_engine_spec() if on_gpu() else local,
        vocab_size=architecture.vocab_size,
        max_sequence_length=phase.recipe.model.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=int(architecture.rope["rope_theta"]),
        share_embeddings_and_output_weights=architecture.tied_embeddings,
        pg_collection=groups,
    )
    model.local_vocab_rows = architecture.vocab_size  # what `load_weights` asks a chunk for
    load_weights([model], hf, architecture, groups)
    return model
