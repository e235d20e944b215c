import errno
import json
import os
import shutil
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from longred_megatron.checkpoint import huggingface
from longred_megatron.checkpoint.huggingface import export, load_weights
from longred_megatron.checkpoint.verification import chunk_logits, same_bits, verify
from longred_megatron.errors import UserError
from longred_megatron.families import read_architecture
from longred_megatron.files import begin_folder
from longred_megatron.layout import Parallel
from longred_megatron.model.chunk import build_chunks
from longred_megatron.precision import Precision
from longred_megatron.recipe.schema import Model
from longred_megatron.rope import RopeSource
from tests.checkpoint.small_models import (
    DYNAMIC_ROPE,
    LINEAR_ROPE,
    LLAMA3_ROPE,
    LONGROPE,
    MODELS,
    YARN_ROPE,
    edit_json,
    write_model,
)


def load(folder, groups, params="fp32"):
    architecture = read_architecture(folder)
    chunks = build_chunks(architecture, Parallel(), Precision(params=params), groups)
    load_weights(chunks, folder, architecture, groups)
    return chunks, architecture


def export_unchanged(chunks, architecture, groups, source, output, **settings):
    unchanged = {"rope": architecture.rope, "max_position_embeddings": architecture.max_position_embeddings}
    export(chunks, source, output, architecture, groups, **unchanged | settings)
    return output


def all_tensors(folder):
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def assert_same_tensors(folder, source):
    got, expected = all_tensors(folder), all_tensors(source)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and same_bits(got[name], tensor), name


@pytest.fixture
def load_silently(caplog):
    """Loads a folder with transformers; fails on any warning, logged or by `warnings`, and any odd tensor."""

    def load_silently(folder):
        caplog.clear()
        transformers_logging.enable_propagation()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        transformers_logging.disable_propagation()
        assert [record.getMessage() for record in caplog.records] == []
        assert not any(report.values()), report
        return model

    return load_silently


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_bitwise_and_logits_agree(name, tmp_path, groups, load_silently):
    source = write_model(name, tmp_path / "source")
    chunks, architecture = load(source, groups)
    output = export_unchanged(chunks, architecture, groups, source, tmp_path / "output")
    assert_same_tensors(output, source)
    load_silently(output)
    found = verify(chunks, output, architecture, groups)
    assert found.different == [] and found.num_tensors == len(all_tensors(source))
    assert found.max_logit_difference < 1e-4 < 0.1 < found.max_logit
    past_the_window = verify(chunks, output, architecture, groups, num_tokens=150)
    assert past_the_window.max_logit_difference < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_its_bits(dtype, tmp_path, groups):
    source = write_model("qwen2", tmp_path / "source", dtype=dtype)
    chunks, architecture = load(source, groups, params="bf16" if dtype is torch.bfloat16 else "fp32")
    output = export_unchanged(chunks, architecture, groups, source, tmp_path / "output")
    assert_same_tensors(output, source)
    assert AutoConfig.from_pretrained(output).dtype is dtype


def test_dtype_can_be_chosen(tmp_path, groups):
    source = write_model("llama_3", tmp_path / "source")
    chunks, architecture = load(source, groups)
    output = export_unchanged(chunks, architecture, groups, source, tmp_path / "output", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in all_tensors(output).values()} == {torch.bfloat16}
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"


def test_sharded_source_and_sharded_export(tmp_path, groups, monkeypatch, load_silently):
    source = write_model("qwen3", tmp_path / "source", max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 3
    monkeypatch.setattr(huggingface, "MAX_SHARD_BYTES", 30_000)
    chunks, architecture = load(source, groups)
    output = export_unchanged(chunks, architecture, groups, source, tmp_path / "output")
    assert_same_tensors(output, source)
    files = sorted(output.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 30_000 for file in files)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in all_tensors(source).values())
    load_silently(output)


EXTENSIONS = {
    "abf": ({"method": "abf", "theta": 2e6}, 256),
    "pi": ({"method": "pi", "factor": 4.0}, 256),
    "yarn": ({"method": "yarn", "factor": 4.0, "beta_fast": 16.0, "attention_factor": 1.2}, 256),
    "dynamic": ({"method": "dynamic"}, 256),
    "longrope": (
        {"method": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 1.5, 3.0, 4.0]},
        256,
    ),
}


@pytest.mark.parametrize("dialect", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("method", EXTENSIONS)
def test_extended_rope_is_read_correctly_by_transformers(method, dialect, tmp_path, groups, load_silently):
    source = write_model("llama_3", tmp_path / "source")
    if dialect == "rope_scaling":
        edit_json(source / "config.json", rope_parameters=None, dtype=None, rope_theta=5e5, torch_dtype="float32")
    chunks, architecture = load(source, groups)
    settings, window = EXTENSIONS[method]
    method = Model(hf=source, rope=settings, max_position_embeddings=window).rope
    rope_source = RopeSource(architecture.rope, architecture.head_dim, original_window=64, target_window=window)
    rope, window = method.extended(rope_source), method.max_position_embeddings(rope_source)
    output = export_unchanged(
        chunks, architecture, groups, source, tmp_path / "output", rope=rope, max_position_embeddings=window
    )
    raw = json.loads((output / "config.json").read_text())
    old_keys = {"rope_theta", "rope_scaling", "torch_dtype"}
    assert (old_keys & raw.keys()) == (old_keys if dialect == "rope_scaling" else set())
    assert ("rope_parameters" in raw) == (dialect == "rope_parameters")
    exported = read_architecture(output)
    assert exported.rope == rope and exported.max_position_embeddings == window
    extended = build_chunks(exported, Parallel(), Precision(params="fp32"), groups)
    load_weights(extended, output, exported, groups)
    for num_tokens in (16, 64, 65, 200):  # up to the original window, past it
        assert verify(extended, output, exported, groups, num_tokens=num_tokens).max_logit_difference < 1e-4
    load_silently(output)
    if method.method in ("dynamic", "longrope"):
        # Later tokens do not change what the model sees of the 64 before them, but all of their frequencies.
        tokens = torch.arange(200)[None] % architecture.vocab_size
        shorter = chunk_logits(extended[0], exported, tokens[:, :64])
        assert (chunk_logits(extended[0], exported, tokens)[:, :64] - shorter).abs().max() > 1e-2


SCALED = [LLAMA3_ROPE, YARN_ROPE, LINEAR_ROPE, DYNAMIC_ROPE, LONGROPE]


@pytest.mark.parametrize("rope", SCALED, ids=lambda rope: rope["rope_type"])
def test_legacy_scaling_named_type_is_kept(rope, tmp_path, groups, load_silently):
    source = write_model("llama_3", tmp_path / "source")
    scaling = {"type" if key == "rope_type" else key: value for key, value in rope.items() if key != "rope_theta"}
    edit_json(source / "config.json", rope_parameters=None, rope_theta=rope["rope_theta"], rope_scaling=scaling)
    chunks, architecture = load(source, groups)
    output = export_unchanged(chunks, architecture, groups, source, tmp_path / "output")
    assert read_architecture(output) == architecture
    raw = json.loads((output / "config.json").read_text())
    assert raw["rope_scaling"]["type"] == raw["rope_scaling"]["rope_type"] == rope["rope_type"]
    assert "rope_parameters" not in raw
    load_silently(output)


def test_other_files_are_copied_and_the_window_is_widened(tmp_path, groups):
    source = write_model("llama_3", tmp_path / "source")
    edit_json(source / "config.json", made_by="somebody")
    (source / "tokenizer.json").write_text("{}")
    (source / "tokenizer_config.json").write_text('{"model_max_length": 64, "bos_token": "ſ"}')
    edit_json(source / "generation_config.json", max_length=32)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    for name in (".hidden", "pytorch_model.bin", "training_args.bin", "consolidated.safetensors", "x.pth"):
        (source / name).write_text("no")
    chunks, architecture = load(source, groups)
    output = export_unchanged(
        chunks,
        architecture,
        groups,
        source,
        tmp_path / "output",
        max_position_embeddings=256,
        recipe_text="model: {}\n",
    )
    found = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    assert found == {
        "additional_chat_templates/tools.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "recipe.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads((output / "tokenizer_config.json").read_text()) == {
        "model_max_length": 256,
        "bos_token": "ſ",
    }
    assert json.loads((output / "generation_config.json").read_text())["max_length"] == 32  # was not the window
    config = json.loads((output / "config.json").read_text())
    assert config["made_by"] == "somebody" and config["max_position_embeddings"] == 256
    assert (output / "recipe.yaml").read_text() == "model: {}\n"
    with safe_open(output / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert (output / "model.safetensors").stat().st_mode == (output / "config.json").stat().st_mode


def test_padding_rows_are_zero(tmp_path, groups):
    chunks, architecture = load(write_model("llama_3", tmp_path / "source"), groups)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert not chunks[0].get_parameter(name)[architecture.vocab_size :].any()


# Errors


@pytest.fixture
def source(tmp_path):
    return write_model("llama_3", tmp_path / "source")


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def problem(folder, groups):
    with pytest.raises(UserError) as caught:
        load(folder, groups)
    return str(caught.value)


def test_tied_head_may_be_stored_but_must_be_equal(tmp_path, groups):
    source = write_model("llama_3_2", tmp_path / "source")
    rewrite(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load(source, groups)
    rewrite(source, lambda t: t["lm_head.weight"].add_(1))
    assert "lm_head.weight differs" in problem(source, groups)


def test_missing_tensors_are_listed(source, groups):
    rewrite(source, lambda t: [t.pop(f"model.layers.{i}.mlp.up_proj.weight") for i in range(3)])
    message = problem(source, groups)
    assert "3 tensors" in message and "model.layers.0.mlp.up_proj.weight" in message


def test_unexpected_tensors_are_listed_but_rotary_buffers_pass(source, groups):
    rewrite(source, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    load(source, groups)
    rewrite(source, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}))
    message = problem(source, groups)
    assert "1 tensors have no place" in message and "q_proj.bias" in message and "inv_freq" not in message


def test_wrong_shape_says_got_and_expected(source, groups):
    rewrite(source, lambda t: t.update({"model.norm.weight": torch.ones(31)}))
    assert "model.norm.weight: got [31], expected [32]" in problem(source, groups)


def test_quantised_weights_are_refused(source, groups):
    rewrite(source, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    assert "model.norm.weight (I8)" in problem(source, groups)


@pytest.mark.parametrize("size", [4, 100, 100_000])
def test_truncated_file_is_named(size, source, groups):
    os.truncate(source / "model.safetensors", size)
    assert str(source / "model.safetensors") in problem(source, groups)


def test_pickles_are_never_loaded(source, groups):
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    assert "pickles are never loaded" in problem(source, groups)


def test_folder_without_weights(source, groups):
    (source / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in problem(source, groups)


def test_index_that_does_not_fit_its_files(tmp_path, groups):
    source = write_model("llama_3", tmp_path / "source", max_shard_size="20KB")
    index = source / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=weight_map | {"model.lost": weight_map["model.norm.weight"]})
    assert "model.lost" in problem(source, groups)
    edit_json(index, weight_map=weight_map)
    lost = sorted(source.glob("*.safetensors"))[1]
    lost.unlink()
    assert str(lost) in problem(source, groups)
    index.write_text("{")
    assert str(index) in problem(source, groups)


def test_output_in_use_is_not_touched(source, tmp_path, groups):
    chunks, architecture = load(source, groups)
    output = tmp_path / "output"
    output.mkdir()
    export_unchanged(chunks, architecture, groups, source, output)  # an empty folder is free
    before = sorted(output.iterdir())
    with pytest.raises(UserError, match="is not empty"):
        export_unchanged(chunks, architecture, groups, source, output)
    assert sorted(output.iterdir()) == before


@pytest.mark.parametrize("where", ["save_tensors", "copy_companions"])
def test_full_disk_leaves_nothing(where, source, tmp_path, groups, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    chunks, architecture = load(source, groups)
    monkeypatch.setattr(huggingface, where, full)
    with pytest.raises(UserError, match="disk is full"):
        export_unchanged(chunks, architecture, groups, source, tmp_path / "new" / "output")
    assert list((tmp_path / "new").iterdir()) == []


def test_what_a_killed_export_left_is_replaced(source, tmp_path, groups):
    chunks, architecture = load(source, groups)
    left = begin_folder(tmp_path / "output")
    (left / "stage-00000-00007.safetensors").write_text("half")
    output = export_unchanged(chunks, architecture, groups, source, tmp_path / "output")
    assert not left.exists() and not list(output.glob("stage-*"))


def test_a_users_folder_of_the_unfinished_name_stays(source, tmp_path, groups):
    chunks, architecture = load(source, groups)
    (tmp_path / "output.partial").mkdir()
    (tmp_path / "output.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"output\.partial: was not made by this program"):
        export_unchanged(chunks, architecture, groups, source, tmp_path / "output")
    assert (tmp_path / "output.partial" / "thesis.txt").read_text() == "mine"
    assert not (tmp_path / "output").exists()


def test_source_without_config_is_named(source, tmp_path, groups):
    chunks, architecture = load(source, groups)
    gone = tmp_path / "gone"
    shutil.copytree(source, gone)
    (gone / "config.json").unlink()
    with pytest.raises(UserError, match=r"gone/config\.json"):
        export_unchanged(chunks, architecture, groups, gone, tmp_path / "output")


def test_rope_that_transformers_cannot_compute_is_refused(source, groups):
    edit_json(source / "config.json", rope_parameters={"rope_type": "axial", "rope_theta": 1e4})
    message = problem(source, groups)
    assert "rope_type 'axial' is not supported; supported are default, linear, dynamic, yarn, longrope," in message


def test_biases_megatron_cannot_hold_are_refused(source, groups):
    edit_json(source / "config.json", attention_bias=True)
    assert "one switch" in problem(source, groups)
