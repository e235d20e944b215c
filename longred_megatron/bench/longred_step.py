"""LongReD's step: this engine against the published algorithm, written plainly on transformers."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import AutoConfig, LlamaForCausalLM

from longred_megatron.bench.base import TOLERANCES, Case, Comparison, Facts, Side, Sizes, formats
from longred_megatron.bench.engine import EngineStep
from longred_megatron.bench.inputs import longred_objectives, longred_recipe, phase_of, step_tokens, write_microbatches
from longred_megatron.bench.plain import PlainAdamW, PlainBatch, read_microbatches
from longred_megatron.device import on_gpu
from longred_megatron.dtypes import DTYPES
from longred_megatron.families import Architecture
from longred_megatron.planning.flops import step_flops
from longred_megatron.training.run import extended_architecture


class LongredStep(Comparison):
    """A LongReD step of this engine against the published algorithm on transformers."""

    name = "longred_step"

    def cases(self, sizes: Sizes, folder: Path) -> Iterator[Case]:
        objectives = longred_objectives(sizes, sizes.layers)
        for params in formats():
            recipe = longred_recipe(folder, sizes, objectives, sizes.layers, params)
            phase = phase_of(recipe)
            microbatches = write_microbatches(phase, folder)
            yield Case(
                f"{sizes.layers} layers of {sizes.hidden_size}, {params}",
                partial(EngineStep, recipe),
                partial(PublishedStep, recipe, microbatches),
                step_tokens(phase),
                "tokens",
                step_flops(phase),
                params,
                TOLERANCES[params],
            )


class PublishedStep(Side):
    """The step as the paper's released code takes it (arXiv 2502.07365).

    Every micro-batch runs the student with its head and all hidden states; every one of short texts the whole teacher
    with its head, too. Loss: cross-entropy of long texts; mean of 1 - cosine similarity on the compared layers, summed
    over them. Each micro-batch's mean is multiplied by its weight, gradients are averaged over micro-batches.
    """

    def __init__(self, recipe: Path, microbatches: Path) -> None:
        phase = phase_of(recipe)
        self._objectives = phase.recipe.objectives
        device = torch.device("cuda" if on_gpu() else "cpu")
        dtype = DTYPES[phase.recipe.precision.params]
        self._student = load(phase.recipe.model.hf, extended_architecture(phase), dtype).to(device)
        self._teacher = load(phase.recipe.teacher.hf, phase.source, dtype).to(device).requires_grad_(False)
        self._adamw = PlainAdamW(self._student, phase.recipe.optimizer)
        self._microbatches = list(read_microbatches(microbatches, device))
        self._facts: Facts = {}

    def once(self) -> None:
        losses: dict[str, list[Tensor]] = {name: [] for name in self._objectives}
        total = torch.zeros((), device=self._student.device)
        for batch in self._microbatches:
            loss = self._loss(batch)
            share = self._objectives[batch.objective].weight * loss / len(self._microbatches)
            share.backward()
            losses[batch.objective].append(loss.detach())
            total += share.detach()
        norm = self._adamw.step()
        means = {f"loss/{name}": float(torch.stack(each).mean()) for name, each in losses.items()}
        self._facts = means | {"loss": float(total), "grad_norm": norm}

    def facts(self) -> Facts:
        return self._facts

    def _loss(self, batch: PlainBatch) -> Tensor:
        """Mean over the micro-batch's tokens."""
        ours = forward(self._student, batch.tokens, batch.student_positions)
        if batch.teacher_positions is None:
            return cross_entropy(ours.logits.flatten(0, 1).float(), batch.labels.flatten())
        with torch.no_grad():
            theirs = forward(self._teacher, batch.tokens, batch.teacher_positions)
        layers = getattr(self._objectives[batch.objective], "layers", (-1,))  # short_to_long: the last one
        pairs = [(ours.hidden_states[k].float(), theirs.hidden_states[k].float()) for k in layers]
        return torch.stack([(1 - cosine_similarity(*pair, dim=-1)).mean() for pair in pairs]).sum()


def load(hf: Path, architecture: Architecture, dtype: torch.dtype) -> Any:
    """The Llama of a folder, with the RoPE and window of `architecture`."""
    config = AutoConfig.from_pretrained(hf)
    config.rope_parameters = dict(architecture.rope)
    config.max_position_embeddings = architecture.max_position_embeddings
    return LlamaForCausalLM.from_pretrained(hf, config=config, dtype=dtype)


def forward(model: Any, tokens: Tensor, positions: Tensor) -> Any:
    """Logits and hidden states. With a mask, transformers does not take jumps of positions for borders of texts."""
    return model(
        tokens,
        position_ids=positions,
        attention_mask=torch.ones_like(tokens),
        output_hidden_states=True,
        use_cache=False,
    )
