import pytest
import torch
from transformers import AutoModelForCausalLM

from longred_megatron.checkpoint.weight_map import (
    Columns,
    PaddedRows,
    Replicated,
    Rows,
    layer_rules,
    outer_rules,
    tensor_shapes,
)
from longred_megatron.families import read_architecture
from longred_megatron.model.stage import padded_vocab_size
from tests.checkpoint.small_models import MODELS


@pytest.fixture(params=MODELS)
def architecture(request, tmp_path):
    MODELS[request.param]().save_pretrained(tmp_path)
    return read_architecture(tmp_path)


def test_tensor_shapes_are_those_of_transformers(architecture, tmp_path):
    from transformers import AutoConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # a tied head once
    assert tensor_shapes(architecture) == expected


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_there_and_back_is_bitwise_for_every_rule(architecture, size, dtype):
    bits = torch.int16 if dtype.itemsize == 2 else torch.int32
    for rule in layer_rules(architecture) + outer_rules(architecture, padded_vocab_size(architecture, size) // size):
        info = torch.iinfo(bits)  # any bits, so NaNs and denormal numbers too
        tensors = {n: torch.randint(info.min, info.max, s, dtype=bits) for n, s in rule.huggingface.items()}
        sources = [tensor.view(dtype) for tensor in tensors.values()]
        back = rule.to_huggingface([rule.to_megatron(sources, rank, size) for rank in range(size)])
        assert list(back) == list(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(back[name].view(bits), tensor), (rule.megatron, name)


def test_query_key_value_lie_group_by_group():
    heads, kv_heads, head_dim, hidden = 4, 2, 3, 5
    q, k, v = (torch.randn(n * head_dim, hidden) for n in (heads, kv_heads, kv_heads))
    rows = Rows((len(q), len(k), len(v)), groups=kv_heads)
    # Group g: query heads 2g and 2g + 1, key head g, value head g.
    expected = torch.cat([q[:6], k[:3], v[:3], q[6:], k[3:], v[3:]])
    assert torch.equal(rows.split([q, k, v], 0, 1), expected)
    assert torch.equal(rows.split([q, k, v], 1, 2), expected[12:])
    bias = Rows((12, 6, 6), groups=kv_heads).split([q[:, 0], k[:, 0], v[:, 0]], 0, 1)
    assert torch.equal(bias, expected[:, 0])


def test_gate_and_up_are_paired_on_each_rank():
    gate, up = torch.randn(8, 3), torch.randn(8, 3)
    assert torch.equal(Rows((8, 8)).split([gate, up], 0, 1), torch.cat([gate, up]))
    assert torch.equal(Rows((8, 8)).split([gate, up], 1, 2), torch.cat([gate[4:], up[4:]]))


def test_columns_are_cut_in_order():
    weight = torch.randn(3, 8)
    assert torch.equal(Columns(8).split([weight], 1, 2), weight[:, 4:])


def test_replicated_tensors_are_whole_on_every_rank():
    norm = torch.randn(8)
    assert all(torch.equal(Replicated().split([norm], rank, 2), norm) for rank in range(2))


def test_padding_rows_are_zero_and_dropped_again():
    table = torch.randn(5, 2)
    rows = PaddedRows(5, local=2)
    shards = [rows.split([table], rank, 4) for rank in range(4)]
    assert [len(shard) for shard in shards] == [2, 2, 2, 2]
    assert torch.equal(torch.cat(shards), torch.cat([table, torch.zeros(3, 2)]))
    assert torch.equal(rows.join(shards)[0], table)


def test_a_table_longer_than_the_ranks_hold_is_cut_off():
    """A teacher's vocabulary may be padded further than the student's, by whose rows both are cut."""
    table = torch.randn(9, 2)
    shards = [PaddedRows(9, local=2).split([table], rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat(shards), table[:6])


def test_both_specifications_names_are_known(architecture):
    names = {name for rule in layer_rules(architecture) for name in rule.megatron}
    assert {"input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"} <= names
    assert {"pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"} <= names


def test_layer_names_are_counted_from_zero(architecture):
    rule = layer_rules(architecture)[0].of_layer(2)
    assert list(rule.huggingface) == ["model.layers.2.input_layernorm.weight"]
