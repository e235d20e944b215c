"""What is derived from a model's shapes, for every small model: transformers and torch count the same."""

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from longred_megatron.families import Architecture, read_architecture
from longred_megatron.families.weights import Part
from longred_megatron.model.chunk import padded_vocab_size
from tests.checkpoint.small_models import MODELS

PARTS = {*Part.__args__}  # type: ignore[attr-defined]


@pytest.fixture(params=MODELS)
def architecture(request, tmp_path):
    return read(request.param, tmp_path)


def read(model, folder):
    MODELS[model]().save_pretrained(folder)
    return read_architecture(folder)


def transformers_model(folder, **settings: Any) -> torch.nn.Module:
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), **settings)


def test_tensor_shapes_are_those_of_transformers(architecture, tmp_path):
    parameters = dict(transformers_model(tmp_path).named_parameters())  # a tied head once
    assert architecture.tensor_shapes() == {name: tuple(p.shape) for name, p in parameters.items()}
    assert architecture.num_parameters() == sum(p.numel() for p in parameters.values())
    outside = sum(p.numel() for name, p in parameters.items() if ".layers." not in name)
    assert architecture.layer_parameters() * architecture.num_layers + outside == architecture.num_parameters()


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_there_and_back_is_bitwise_for_every_rule(architecture, size, dtype):
    bits = torch.int16 if dtype.itemsize == 2 else torch.int32
    for rule in architecture.layer_rules() + architecture.outer_rules(padded_vocab_size(architecture, size) // size):
        info = torch.iinfo(bits)  # any bits, so NaNs and denormal numbers too
        tensors = {n: torch.randint(info.min, info.max, s, dtype=bits) for n, s in rule.huggingface.items()}
        sources = [tensor.view(dtype) for tensor in tensors.values()]
        back = rule.to_huggingface([rule.to_megatron(sources, rank, size) for rank in range(size)])
        assert list(back) == list(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(back[name].view(bits), tensor), (rule.megatron, name)


def test_both_specifications_names_are_known(architecture):
    names = {name for rule in architecture.layer_rules() for name in rule.megatron}
    assert {"input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"} <= names
    assert {"pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"} <= names


def test_layer_names_are_counted_from_zero(architecture):
    names = [[name for rule in architecture.layer_rules(k) for name in rule.huggingface] for k in (0, 2)]
    assert [name.replace(".0.", ".2.", 1) for name in names[0]] == names[1]
    assert {*names[0], *names[1]} <= architecture.tensor_shapes().keys()


def test_every_rule_is_of_one_part(architecture):
    rules = architecture.layer_rules() + architecture.outer_rules()
    assert {rule.part for rule in rules} == PARTS - ({"head"} if architecture.tied_embeddings else set())
    for rule in rules:
        name = rule.megatron[0]
        if "norm" in name:
            assert rule.part == "norm"
        elif "linear" in name:
            assert rule.part == ("attention" if "self_attention" in name else "mlp")
    outer = ["embedding", "norm", "embedding"] if architecture.tied_embeddings else ["embedding", "norm", "head"]
    assert [rule.part for rule in architecture.outer_rules()] == outer


def test_forward_flops_equal_torchs_count(architecture, tmp_path):
    model = transformers_model(tmp_path, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 32, dtype=torch.long))
    # The eager attention counts the whole square; a causal kernel computes half of it, and so do we.
    ours = 32 * architecture.forward_flops_per_token(architecture.num_layers, 2 * 32, head=True)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_fewer_layers_and_no_head_cost_less(architecture):
    full = architecture.forward_flops_per_token(2, 64, head=False)
    assert full == 2 * architecture.forward_flops_per_token(1, 64, head=False)
    with_head = replace(architecture, vocab_size=1000).forward_flops_per_token(0, 64, head=True)
    assert with_head == 2 * architecture.hidden_size * 1000


@pytest.mark.parametrize("model", ["llama_3", "llama_biases", "qwen3", "phi3"])
def test_activations_are_what_products_and_norms_keep(model, tmp_path):
    """Inputs and outputs of both norms; queries, keys, values and attention's output; gate, up and their product."""
    a = read(model, tmp_path)
    attention = (2 * a.num_attention_heads + 2 * a.num_kv_heads) * a.head_dim
    mlp = 3 * a.intermediate_size
    assert a.layer_activations() == (4 * a.hidden_size, attention + mlp, mlp)


def test_checkpoints_of_before_the_newer_fields_load(architecture):
    stored = asdict(architecture)
    del stored["hidden_act"], stored["embedding_scale"]
    assert Architecture(**stored) == architecture
