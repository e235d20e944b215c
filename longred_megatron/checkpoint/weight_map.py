"""Which Hugging Face tensors each Megatron parameter is made of, and how: one table, read in both directions.

Rows and columns are cut, stacked and put back; no number is ever computed, so both directions are bitwise.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from longred_megatron.families import Architecture
from longred_megatron.model.stage import Stage

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


class Source(Protocol):
    """A Hugging Face tensor that is read where it is indexed: a Tensor or a slice of a safetensors file."""

    def __getitem__(self, index: Any) -> Tensor: ...


class Layout(Protocol):
    """How a parameter is split over the tensor-parallel group."""

    def split(self, sources: Sequence[Source], rank: int, size: int) -> Tensor: ...

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]: ...


@dataclass(frozen=True)
class Replicated:
    """Every tensor rank holds the whole tensor."""

    def split(self, sources: Sequence[Source], rank: int, size: int) -> Tensor:
        return sources[0][:]

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [shards[0]]


@dataclass(frozen=True)
class Columns:
    """Row-parallel weights: a tensor rank holds a contiguous part of dim 1."""

    columns: int

    def split(self, sources: Sequence[Source], rank: int, size: int) -> Tensor:
        local = self.columns // size
        return sources[0][:, rank * local : (rank + 1) * local]

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(list(shards), dim=1)]


@dataclass(frozen=True)
class Rows:
    """Column-parallel weights and biases: tensors of `rows` rows, stacked group by group.

    A group has an equal share of every tensor's rows. Query, key and value: a group is a key-value head with
    its query heads. Gate and up (`groups` None): a group is a tensor rank's share.
    """

    rows: tuple[int, ...]
    groups: int | None = None

    def split(self, sources: Sequence[Source], rank: int, size: int) -> Tensor:
        local_groups = (self.groups or size) // size
        parts = []
        for source, rows in zip(sources, self.rows, strict=True):
            local = rows // size
            part = source[rank * local : (rank + 1) * local]
            parts.append(part.reshape(local_groups, local // local_groups, *part.shape[1:]))
        return torch.cat(parts, dim=1).flatten(0, 1)

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        groups = self.groups or len(shards)
        stacked = torch.cat(list(shards))
        parts = stacked.view(groups, -1, *stacked.shape[1:]).split([rows // groups for rows in self.rows], dim=1)
        return [part.reshape(-1, *stacked.shape[1:]) for part in parts]


@dataclass(frozen=True)
class PaddedRows:
    """Embedding and head: `rows` rows, of which each rank holds `local` (0: none is to be split), zeros at the end."""

    rows: int
    local: int = 0

    def split(self, sources: Sequence[Source], rank: int, size: int) -> Tensor:
        start, end = (min(place * self.local, self.rows) for place in (rank, rank + 1))
        part = sources[0][start:end]
        return torch.cat((part, part.new_zeros(self.local - len(part), *part.shape[1:])))

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(list(shards))[: self.rows].contiguous()]


@dataclass(frozen=True)
class Rule:
    """One kind of Megatron parameter.

    `megatron`: its names, one for each specification (plain and Transformer Engine) that has its own.
    `huggingface`: the tensors it is made of, name -> shape. Names of a layer's parameters start at the layer.
    """

    megatron: tuple[str, ...]
    huggingface: Mapping[str, tuple[int, ...]]
    layout: Layout

    def to_megatron(self, sources: Sequence[Source], tp_rank: int, tp_size: int) -> Tensor:
        """The shard of tensor rank `tp_rank`, from tensors in the order of `huggingface`."""
        return self.layout.split(sources, tp_rank, tp_size)

    def to_huggingface(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        """The tensors by name, from the shards of all tensor ranks in order."""
        return dict(zip(self.huggingface, self.layout.join(shards), strict=True))

    def of_layer(self, index: int) -> "Rule":
        """The rule with the full tensor names of layer `index`, counted from 0 as in Hugging Face's names."""
        names = {f"model.layers.{index}.{name}": shape for name, shape in self.huggingface.items()}
        return replace(self, huggingface=names)


def layer_rules(architecture: Architecture) -> list[Rule]:
    """The parameters of one layer."""
    a = architecture
    hidden, ffn = a.hidden_size, a.intermediate_size
    query, kv = a.num_attention_heads * a.head_dim, a.num_kv_heads * a.head_dim
    qkv = Rows((query, kv, kv), groups=a.num_kv_heads)
    gate_up = Rows((ffn, ffn))

    def replicated(names: tuple[str, ...], huggingface: str, size: int) -> Rule:
        return Rule(names, {huggingface: (size,)}, Replicated())

    rules = [
        replicated(
            ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
            "input_layernorm.weight",
            hidden,
        ),
        Rule(
            ("self_attention.linear_qkv.weight",),
            {
                "self_attn.q_proj.weight": (query, hidden),
                "self_attn.k_proj.weight": (kv, hidden),
                "self_attn.v_proj.weight": (kv, hidden),
            },
            qkv,
        ),
        Rule(
            ("self_attention.linear_proj.weight",),
            {"self_attn.o_proj.weight": (hidden, query)},
            Columns(query),
        ),
        replicated(
            ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
            "post_attention_layernorm.weight",
            hidden,
        ),
        Rule(
            ("mlp.linear_fc1.weight",),
            {"mlp.gate_proj.weight": (ffn, hidden), "mlp.up_proj.weight": (ffn, hidden)},
            gate_up,
        ),
        Rule(("mlp.linear_fc2.weight",), {"mlp.down_proj.weight": (hidden, ffn)}, Columns(ffn)),
    ]
    if a.qkv_bias:
        biases = {
            "self_attn.q_proj.bias": (query,),
            "self_attn.k_proj.bias": (kv,),
            "self_attn.v_proj.bias": (kv,),
        }
        rules.append(Rule(("self_attention.linear_qkv.bias",), biases, qkv))
    if a.attention_output_bias:
        rules.append(replicated(("self_attention.linear_proj.bias",), "self_attn.o_proj.bias", hidden))
    if a.mlp_bias:
        biases = {"mlp.gate_proj.bias": (ffn,), "mlp.up_proj.bias": (ffn,)}
        rules.append(Rule(("mlp.linear_fc1.bias",), biases, gate_up))
        rules.append(replicated(("mlp.linear_fc2.bias",), "mlp.down_proj.bias", hidden))
    if a.qk_norm:
        rules.append(replicated(("self_attention.q_layernorm.weight",), "self_attn.q_norm.weight", a.head_dim))
        rules.append(replicated(("self_attention.k_layernorm.weight",), "self_attn.k_norm.weight", a.head_dim))
    return rules


def outer_rules(architecture: Architecture, local_rows: int = 0) -> list[Rule]:
    """The parameters outside the layers. A tied head (a copy on the last stage) reads the embedding.

    local_rows: of the vocabulary on each tensor rank.
    """
    shape = (architecture.vocab_size, architecture.hidden_size)
    rows = PaddedRows(architecture.vocab_size, local_rows)
    head = EMBEDDING if architecture.tied_embeddings else HEAD
    return [
        Rule(("embedding.word_embeddings.weight",), {EMBEDDING: shape}, rows),
        Rule(("decoder.final_layernorm.weight",), {"model.norm.weight": shape[1:]}, Replicated()),
        Rule(("output_layer.weight",), {head: shape}, rows),
    ]


def tensor_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the Hugging Face model."""
    rules = outer_rules(architecture)
    rules += [rule.of_layer(k) for k in range(architecture.num_layers) for rule in layer_rules(architecture)]
    return {name: shape for rule in rules for name, shape in rule.huggingface.items()}


def stage_rules(stage: Stage, architecture: Architecture) -> dict[str, Rule]:
    """The rule of every parameter of `stage`, by the parameter's name, with the model-wide layer numbers."""
    outer = {name: rule for rule in outer_rules(architecture, stage.local_vocab_rows) for name in rule.megatron}
    layer = {name: rule for rule in layer_rules(architecture) for name in rule.megatron}
    rules = {}
    for name, _ in stage.named_parameters():
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
        if match:
            number = stage.decoder.layers[int(match[1])].layer_number  # from 1
            rules[name] = layer[match[2]].of_layer(number - 1)
        else:
            rules[name] = outer[name]
    return rules
