"""One pipeline stage of a model, student or teacher. The only user of Megatron's GPTModel."""

from collections.abc import Collection

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from longred_megatron.device import on_gpu
from longred_megatron.families import Architecture
from longred_megatron.layout import Parallel
from longred_megatron.model.attention import Documents, SequenceLayout, sequence_layout
from longred_megatron.model.megatron_config import transformer_config
from longred_megatron.model.plain_layers import Rotation
from longred_megatron.model.rotary import rotary_table
from longred_megatron.model.specs import block_submodules
from longred_megatron.model.taps import attention_values
from longred_megatron.objectives.base import Tap
from longred_megatron.precision import Precision
from longred_megatron.rope.frequencies import RotaryFrequencies


class ModelChunk(GPTModel):
    """The layers of one (virtual) pipeline stage, on tokens laid out as [tokens, 1, hidden].

    `forward` returns hidden states, never logits: every loss is computed from them (see training/losses.py).
    """

    def __init__(
        self,
        architecture: Architecture,
        config: TransformerConfig,
        frequencies: RotaryFrequencies,
        groups: ProcessGroupCollection,
        vp_stage: int | None,
        vocab_rows: int,
    ) -> None:
        pp_rank, num_stages = groups.pp.rank(), groups.pp.size()
        num_chunks = config.virtual_pipeline_model_parallel_size or 1
        num_layers = get_num_layers_to_build(config, vp_stage, pp_rank)
        super().__init__(
            config,
            block_submodules(config, num_layers, transformer_engine=on_gpu()),
            vocab_size=vocab_rows,
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=pp_rank == 0 and (vp_stage or 0) == 0,
            post_process=pp_rank == num_stages - 1 and (vp_stage or 0) == num_chunks - 1,
            share_embeddings_and_output_weights=architecture.tied_embeddings,
            position_embedding_type="none",  # rotary tables come with each micro-batch
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        self.architecture = architecture
        self.local_vocab_rows = vocab_rows // config.tensor_model_parallel_size
        # Not a buffer: conversion of the module to bf16 must not touch it.
        self.frequencies = frequencies

    def layer_numbers(self) -> range:
        """The layers of this chunk, numbered as in Hugging Face `hidden_states` (the first layer's output is 1)."""
        numbers = [layer.layer_number for layer in self.decoder.layers]
        return range(numbers[0], numbers[-1] + 1) if numbers else range(0)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        taps: Collection[Tap] = (),
        whole_sequences: bool = False,
        documents: Documents | None = None,
        length: int | None = None,
    ) -> tuple[Tensor, dict[Tap, Tensor]]:
        """Args:
            tokens, positions: [sequences, sequence_length] of this context-parallel rank, int64.
            taps: what is wanted beside the output; those of layers that lie elsewhere are ignored.
            whole_sequences: whether context-parallel ranks hold whole sequences, or a cut of each.
            documents: lengths of each sequence's documents, where a token sees only its own; needs whole sequences.
            length: largest position + 1 of the whole micro-batch, the same on all context-parallel ranks; None will do
                for a RoPE that does not depend on it.

        Returns:
            The chunk's output [tokens, 1, hidden] (tokens split over the tensor ranks under sequence parallelism) and
            {tap: value}, see `objectives.base.Activations`. The last layer's hidden state is taken after the final
            norm, as in Hugging Face.
        """
        first_input = self._embed(tokens) if self.pre_process else self.decoder.input_tensor
        angles = rotary_table(positions, self.frequencies(length))
        layout = self._layout(tokens, whole_sequences, documents)
        rotary = angles if on_gpu() else None  # a fused kernel takes the angles themselves
        if rotary is None:
            layout.rotation = Rotation.of(angles)
        numbers, last = self.layer_numbers(), self.architecture.num_layers
        wanted = [tap for tap in sorted(taps) if tap.layer in numbers]
        # A layer's other values are computed from its input, the output of the layer before.
        outputs = {tap.layer if tap.what == "hidden" else tap.layer - 1 for tap in wanted}
        inner = sorted(outputs & set(numbers) - {last})
        output = self.decoder(
            first_input if self.pre_process else None,
            attention_mask=None,
            rotary_pos_emb=rotary,
            packed_seq_params=layout,
            extract_layer_indices={k - 1 for k in inner},
        )
        output, extracted = output if inner else (output, [])
        states = dict(zip(inner, extracted, strict=True)) | {last: output}
        values = {tap: states[tap.layer] for tap in wanted if tap.what == "hidden"}
        for layer in self.decoder.layers:
            inside = [tap for tap in wanted if tap.layer == layer.layer_number and tap.what != "hidden"]
            if inside:
                hidden = states.get(layer.layer_number - 1, first_input)
                found = attention_values(
                    layer, hidden, [tap.what for tap in inside], rotary, self.frequencies.attention_factor, layout
                )
                values |= {tap: found[tap.what] for tap in inside}
        return output, values

    def _embed(self, tokens: Tensor) -> Tensor:
        hidden, scale = self.embedding(tokens.reshape(1, -1), position_ids=None), self.architecture.embedding_scale
        if scale != 1:  # as in transformers, in the embedding's own number format
            hidden = hidden * torch.tensor(scale, dtype=hidden.dtype)
        if torch.is_grad_enabled() and not hidden.requires_grad:
            # Of a frozen embedding: recomputed layers get gradients only behind an input that asks for one.
            hidden.requires_grad_()
        return hidden

    def _layout(self, tokens: Tensor, whole_sequences: bool, documents: Documents | None) -> SequenceLayout:
        (num_sequences, length), device, context = tokens.shape, tokens.device, self.pg_collection.cp
        if context.size() == 1:
            return sequence_layout(num_sequences, length, documents, device)
        if whole_sequences:
            return sequence_layout(num_sequences, length, documents, device, local_cp_size=1)
        return sequence_layout(num_sequences, length * context.size(), documents, device, cp_group=context)

    def head_weight(self) -> Tensor:
        """The language-model head's rows on this tensor rank, [padded vocabulary / tensor, hidden]. Last chunk only."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight  # Megatron's own accessor would give a single chunk's embedding

    def truncate(self, depth: int, keep_head: bool) -> None:
        """Drops the layers above number `depth`, and the head unless it is kept: what no loss needs of a teacher."""
        self.decoder.layers = torch.nn.ModuleList(m for m in self.decoder.layers if m.layer_number <= depth)
        if self.post_process and not keep_head:
            del self.output_layer


def padded_vocab_size(architecture: Architecture, tensor: int) -> int:
    """The embedding's rows, filled up to a multiple of the tensor-parallel size."""
    return -(-architecture.vocab_size // tensor) * tensor


def build_chunks(
    architecture: Architecture,
    parallel: Parallel,
    precision: Precision,
    groups: ProcessGroupCollection,
    recompute: str = "none",
    vocab_rows: int | None = None,
) -> list[ModelChunk]:
    """This rank's chunks in order, one without virtual pipeline stages, with uninitialised weights.

    Position encoding follows `architecture.rope`; give the student an architecture whose `rope` is the extended one.

    vocab_rows: of embedding and head over all tensor ranks; None: the architecture's, filled up to a multiple of them.
    """
    frequencies = RotaryFrequencies(
        architecture.rope, architecture.head_dim, architecture.max_position_embeddings, torch.cuda.current_device()
    )
    config = transformer_config(
        architecture, parallel, precision, recompute=recompute, attention_factor=frequencies.attention_factor
    )
    chunks = range(parallel.virtual_pipeline) if parallel.virtual_pipeline else [None]
    rows = vocab_rows or padded_vocab_size(architecture, parallel.tensor)
    return [ModelChunk(architecture, config, frequencies, groups, chunk, rows) for chunk in chunks]
