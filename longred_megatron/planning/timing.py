"""Seconds of a step by part, and the messages it sends, from FLOPs, bytes and a GPU's description."""

from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

from longred_megatron.families import Architecture
from longred_megatron.families.weights import Part
from longred_megatron.kernels.linear_loss import CHUNK_BYTES
from longred_megatron.layout import Parallel
from longred_megatron.planning.gpus import Gpu
from longred_megatron.planning.memory import StageMemory
from longred_megatron.planning.parameters import MATRICES, ChunkModel, partial_gradients
from longred_megatron.precision import GRADIENT_BYTES
from longred_megatron.recipe import Phase

Seconds = Mapping[str, float]
# Of the forward pass: flash attention's backward recomputes the scores (five products against two).
ATTENTION_BACKWARD = 2.5
# Passes over each fp32 tensor of a loss's chunk; ours, by counting the operations of kernels/: 8 over 1.5 tensors for
# cross-entropy in bf16.
LOSS_PASSES = 8 / 1.5
# Adam: reads gradient, fp32 weight and two moments, writes the last three and the new weight.
ADAM_TRAFFIC = 4 + 3 * 4 + 3 * 4
MLP: tuple[Part, ...] = ("mlp",)


class LayerMessages(NamedTuple):
    """All-gathers and reduce-scatters of hidden states over the tensor ranks in one layer; an all-reduce is both."""

    forward: int
    backward: int
    recomputed: int


def layer_messages(parallel: Parallel, recompute: str) -> LayerMessages:
    """Before and after attention, before and after the MLP. Under sequence parallelism, backward gathers the inputs of
    both once more for the gradients of weights."""
    return LayerMessages(4, 6 if parallel.sequence else 4, {"none": 0, "selective": 2, "full": 4}[recompute])


class PassTime(NamedTuple):
    """Of one micro-batch in one chunk, by part."""

    forward: Seconds
    backward: Seconds


class StageTime:
    """The times of one stage's ranks. world_size: ranks of the whole run."""

    def __init__(self, phase: Phase, world_size: int, memory: StageMemory, gpu: Gpu) -> None:
        self.phase, self.gpu, self.memory, self.world_size = phase, gpu, memory, world_size
        self.messages = layer_messages(phase.recipe.parallel, phase.recipe.training.recompute)
        self.chunk_time = cache(self._chunk_time)
        self.teacher_seconds = cache(self._teacher_seconds)
        self.data_bytes = cache(self._data_bytes)

    # Links. Megatron numbers ranks by tensor, context, data, pipeline axis, the first fastest.

    def link(self, axis: str) -> float:
        """Bytes a second that a rank sends to the others of its group."""
        p, gpu = self.phase.recipe.parallel, self.gpu
        extents = {"tensor": p.tensor, "context": p.tensor * p.context, "data": self.world_size // p.pipeline}
        if extents.get(axis, self.world_size) <= gpu.gpus_per_node:
            return gpu.link_bandwidth * gpu.link_efficiency
        return gpu.network_bandwidth * gpu.network_efficiency

    def _matrix(self, flops: float, layers: bool = True) -> float:
        gpu, precision = self.gpu, self.phase.recipe.precision
        fp8 = layers and precision.fp8 is not None and gpu.fp8_flops
        return flops / ((gpu.fp8_flops if fp8 else gpu.bf16_flops) or 1) / gpu.matrix_efficiency

    def _touched(self, num_bytes: float) -> float:
        return num_bytes / (self.gpu.memory_bandwidth * self.gpu.memory_efficiency)

    def layer_seconds(self, model: Architecture, name: str, layers: bool = True) -> dict[str, float]:
        """The forward pass of one layer."""
        recipe, site = self.phase.recipe, self.phase.sites[name]
        p, size, tokens = recipe.parallel, recipe.precision.number_bytes, site.rank_tokens
        length = recipe.objectives[name].sequence_length
        products = model.forward_flops_per_token(1, 0, False) * tokens / p.tensor
        attention = model.forward_flops_per_token(1, length, False) * tokens / p.tensor - products
        own = tokens / (p.tensor if p.sequence else 1)
        # Two norms read and write, two residuals read two and write one; the gate three, RoPE two.
        touched = own * model.hidden_size * size * 10
        touched += tokens * size / p.tensor * (3 * model.intermediate_size)
        touched += tokens * size / p.tensor * 2 * (model.num_attention_heads + model.num_kv_heads) * model.head_dim
        attention_seconds = attention / self.gpu.bf16_flops / self.gpu.attention_efficiency
        ring = self.ring_bytes(model, name) / self.link("context")
        return {
            "matrix products": self._matrix(products, layers),
            "attention": attention_seconds,
            "elementwise": self._touched(touched),
            "tensor-parallel messages": self.messages.forward * self.tensor_bytes(model, name) / self.link("tensor"),
            "context-parallel messages": max(0.0, ring - attention_seconds),
        }

    def host_seconds(self, model: Architecture, name: str) -> float:
        """What a process takes to start one layer's forward pass: each operation once, attention for each part of the
        context ring."""
        site, recipe, objective = self.phase.sites[name], self.phase.recipe, self.phase.recipe.objectives[name]
        tokens = self.memory.tokens(objective, site)
        operations = len(self.memory.layer_operations(model, tokens, recipe.precision))
        if not objective.whole_sequences:
            operations += recipe.parallel.context - 1
        return operations * self.gpu.operation_host_seconds

    def tensor_bytes(self, model: Architecture, name: str) -> float:
        """One all-gather or reduce-scatter of a micro-batch's hidden states over the tensor ranks, sent by a rank."""
        p, size = self.phase.recipe.parallel, self.phase.recipe.precision.number_bytes
        return self.phase.sites[name].rank_tokens * model.hidden_size * size * (p.tensor - 1) / p.tensor

    def ring_bytes(self, model: Architecture, name: str) -> float:
        """Keys and values of one layer's forward pass, sent by a rank around the context ranks."""
        p, objective = self.phase.recipe.parallel, self.phase.recipe.objectives[name]
        if objective.whole_sequences:
            return 0.0
        kv = 2 * model.num_kv_heads * model.head_dim * self.phase.recipe.precision.number_bytes / p.tensor
        return (p.context - 1) * self.phase.sites[name].rank_tokens * kv

    def end_bytes(self, chunk: ChunkModel, name: str) -> float:
        """Sent by a tensor rank for the embedding's output, for the head's input and its gradient, for the loss, and
        for a teacher's head: its input, which each rank has but under sequence parallelism, and the choice of entries.
        """
        needs, parallel, site = self.phase.needs[name], self.phase.recipe.parallel, self.phase.sites[name]
        embedding = 2 * chunk.first  # an all-reduce forward; or a reduce-scatter, and an all-gather backward
        head = 2 * (chunk.last and needs.student_head)
        sent = (embedding + head) * self.tensor_bytes(self.phase.source, name)
        if chunk.last and needs.student_head:
            sent += self.phase.recipe.objectives[name].message_bytes(site)
        if chunk.last and self.phase.teacher_head(name):
            sent += parallel.sequence * self.tensor_bytes(site.teacher, name)
            if needs.teacher_entries:
                sent += needs.teacher_entries.choice_bytes(site.rank_tokens, parallel.tensor)
        return sent

    def tap_bytes(self, name: str) -> float:
        """Sent by a tensor rank for values inside attention, which `model.taps` makes a second time: for an attention
        output all of an attention's messages, for queries, keys and values those of its first projection."""
        sequence, pairs = self.phase.recipe.parallel.sequence, self.phase.needs[name].pairs
        here = {layer for chunk in self.memory.chunks for layer in chunk.layers}
        made = {(tap.layer, tap.what == "attention_output") for tap in pairs if tap.what != "hidden"}
        sent = 0.0
        for layer, output in made:
            if layer in here:
                messages = (4 if output else 2) + sequence
                sent += messages * self.tensor_bytes(self.phase.source, name)
                if self.phase.teacher_depth(name):
                    sent += (2 if output else sequence) * self.tensor_bytes(self.phase.sites[name].teacher, name)
        return sent

    def tensor_step_bytes(self, name: str) -> float:
        """All of a micro-batch's tensor-parallel messages on this stage."""
        layers = sum(len(chunk.layers) for chunk in self.memory.chunks)
        sent = layers * sum(self.messages) * self.tensor_bytes(self.phase.source, name)
        sent += sum(self.end_bytes(chunk, name) for chunk in self.memory.chunks) + self.tap_bytes(name)
        if self.phase.teacher_depth(name):
            embedding = (1 if self.phase.recipe.parallel.sequence else 2) * (self.memory.stage == 0)
            messages = self.messages.forward * self._teacher_layers(name) + embedding
            sent += messages * self.tensor_bytes(self.phase.sites[name].teacher, name)
        return sent

    def tensor_gradient_bytes(self) -> float:
        """Once a step: gradients of what each tensor rank has whole, of which each has a part. Too few to take time."""
        p = self.phase.recipe.parallel
        elements = partial_gradients(self.memory.chunks, self.phase.recipe.training.trainable, p.sequence)
        return 2 * (p.tensor - 1) / p.tensor * GRADIENT_BYTES * elements

    def context_step_bytes(self, name: str) -> float:
        """All of a micro-batch's messages around the context ring on this stage."""
        layers = sum(len(chunk.layers) for chunk in self.memory.chunks)
        passes = 3 + (self.phase.recipe.training.recompute == "full")
        sent = layers * passes * self.ring_bytes(self.phase.source, name)
        if self.phase.teacher_depth(name):
            sent += self._teacher_layers(name) * self.ring_bytes(self.phase.sites[name].teacher, name)
        return sent

    def pipeline_step_bytes(self, name: str) -> float:
        """All that this stage sends of a micro-batch to the stages before and after it."""
        p, stage, depth = self.phase.recipe.parallel, self.memory.stage, self.phase.teacher_depth(name)
        if p.pipeline == 1:
            return 0.0
        ends = (stage == 0) + (stage == p.pipeline - 1)
        sent = (2 * len(self.memory.chunks) - ends) * self.message_bytes()
        if depth:
            teacher = self.phase.sites[name].teacher
            chunks = p.for_depth(teacher.num_layers).chunk_layers(teacher.num_layers)
            following = (chunks[number + 1] for number in self._teacher_chunks(name) if number + 1 < len(chunks))
            needed = sum(chunk.start <= depth for chunk in following)
            sent += needed * self.message_bytes() * teacher.hidden_size / self.phase.source.hidden_size
        return sent

    def _teacher_chunks(self, name: str) -> dict[int, range]:
        """{number of a chunk of the teacher: its layers} on this stage."""
        parallel, depth = self.phase.recipe.parallel, self.phase.sites[name].teacher.num_layers
        chunks = parallel.for_depth(depth).chunk_layers(depth)
        return {number: chunks[number] for number in range(self.memory.stage, len(chunks), parallel.pipeline)}

    def _teacher_layers(self, name: str) -> int:
        """Of this stage, up to the deepest that a loss needs."""
        depth = self.phase.teacher_depth(name)
        return sum(number <= depth for chunk in self._teacher_chunks(name).values() for number in chunk)

    def _teacher_seconds(self, name: str) -> dict[str, float]:
        """The forward pass of a micro-batch's teacher on this stage."""
        site = self.phase.sites[name]
        if not self.phase.teacher_depth(name):
            return {}
        fp8 = self.phase.recipe.precision.of_teacher().fp8 is not None
        layer = sum(self.layer_seconds(site.teacher, name, fp8).values())
        return {"teacher": self._teacher_layers(name) * max(layer, self.host_seconds(site.teacher, name))}

    def _chunk_time(self, number: int, name: str) -> PassTime:
        recipe, site, chunk = self.phase.recipe, self.phase.sites[name], self.memory.chunks[number]
        model, recompute = self.phase.source, recipe.training.recompute
        layer = self.layer_seconds(model, name)
        forward = defaultdict(float, {part: len(chunk.layers) * seconds for part, seconds in layer.items()})
        backward = {part: 2 * seconds for part, seconds in forward.items()}
        backward["attention"] = ATTENTION_BACKWARD * forward["attention"]
        message = forward["tensor-parallel messages"] / self.messages.forward
        backward["tensor-parallel messages"] = self.messages.backward * message
        if recompute == "full":
            backward["recomputation"] = sum(forward.values())
        elif recompute == "selective":
            mlp = model.layer_parameters(MLP) / model.layer_parameters(MATRICES)
            backward["recomputation"] = forward["matrix products"] * mlp + self.messages.recomputed * message
        host = len(chunk.layers) * self.host_seconds(model, name)
        for passed, times in ((forward, 1), (backward, 3 if recompute == "full" else 2)):
            passed["starting operations"] = max(0.0, times * host - sum(passed.values()))
        forward["tensor-parallel messages"] += self.end_bytes(chunk, name) / self.link("tensor")
        if chunk.last and self.phase.needs[name].student_head:
            heads = 3 + self.phase.teacher_head(name)  # two gradients are made with the logits
            flops = 2 * model.hidden_size * model.vocab_size * site.rank_tokens / recipe.parallel.tensor
            forward["losses"] += self._matrix(heads * flops, layers=False)
            scores = 4 * site.rank_tokens * model.vocab_size / recipe.parallel.tensor
            chunks = scores / min(CHUNK_BYTES, scores)
            forward["losses"] += self._touched(LOSS_PASSES * chunks * recipe.objectives[name].working_bytes(site))
        if any(tap.layer in chunk.layers for tap in self.phase.needs[name].pairs):
            flops = recipe.objectives[name].own_flops(site) / recipe.parallel.tensor / recipe.parallel.context
            forward["losses"] += flops / self.gpu.bf16_flops / self.gpu.attention_efficiency
        if recipe.parallel.pipeline == 1:
            forward.update(self.teacher_seconds(name))
        return PassTime(dict(forward), backward)

    def message_bytes(self) -> float:
        """Hidden states from one stage to the next."""
        recipe = self.phase.recipe
        p, tokens = recipe.parallel, recipe.step.tokens_per_microbatch / recipe.parallel.context
        own = tokens / (p.tensor if p.sequence else 1)
        return own * self.phase.source.hidden_size * recipe.precision.number_bytes

    def _data_bytes(self) -> dict[str, float]:
        """Gradients' reduce-scatter and weights' all-gather over data- and context-parallel ranks, sent by a rank."""
        resident, ranks = self.memory.resident, self.memory.replicas * self.phase.recipe.parallel.context
        share = (ranks - 1) / ranks
        elements = resident["gradients"] / GRADIENT_BYTES
        return {
            "gradients": resident["gradients"] * share,
            "weights": elements * self.phase.recipe.precision.number_bytes * share,
        }

    def end_seconds(self) -> dict[str, float]:
        """After the passes: gradients are reduced, weights updated and gathered."""
        data, ranks = self.data_bytes(), self.memory.replicas * self.phase.recipe.parallel.context
        elements = self.memory.resident["gradients"] / GRADIENT_BYTES / ranks
        return {
            "data-parallel messages": sum(data.values()) / self.link("data"),
            "optimizer": self._touched(elements * ADAM_TRAFFIC),
            "host beside the passes": self.gpu.step_host_seconds,
        }
