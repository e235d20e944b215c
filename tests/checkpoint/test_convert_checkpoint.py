import json
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from longred_megatron.checkpoint import distributed
from longred_megatron.checkpoint.verification import same_bits
from longred_megatron.errors import UserError
from tests.checkpoint.small_models import edit_json, write_model
from tools.convert_checkpoint import main


@pytest.fixture
def converted(tmp_path):
    source = write_model("qwen3_tied", tmp_path / "source", dtype=torch.bfloat16)
    (source / "tokenizer.json").write_text("{}")
    main(["hf-to-megatron", "--hf", str(source), "--output", str(tmp_path / "checkpoint")])
    return source, tmp_path / "checkpoint"


def to_hf(checkpoint, output):
    main(["megatron-to-hf", "--checkpoint", str(checkpoint), "--output", str(output)])
    return load_file(output / "model.safetensors")


def test_there_and_back_is_bitwise(converted, tmp_path, capsys):
    source, checkpoint = converted
    main(["verify", "--hf", str(source), "--checkpoint", str(checkpoint)])
    assert "46 of 46 equal" in capsys.readouterr().out
    back, expected = to_hf(checkpoint, tmp_path / "back"), load_file(source / "model.safetensors")
    assert back.keys() == expected.keys()
    assert all(back[n].dtype == t.dtype and same_bits(back[n], t) for n, t in expected.items())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_export_needs_no_source_folder(converted, tmp_path):
    source, checkpoint = converted
    expected = load_file(source / "model.safetensors")
    shutil.rmtree(source)
    back = to_hf(checkpoint, tmp_path / "back")
    assert all(back[n].dtype == t.dtype and same_bits(back[n], t) for n, t in expected.items())
    assert (tmp_path / "back" / "tokenizer.json").exists()
    shutil.rmtree(checkpoint / "hf_source")
    with pytest.raises(UserError, match="in neither"):
        to_hf(checkpoint, tmp_path / "again")


def test_training_checkpoint_brings_its_window_and_recipe(converted, tmp_path):
    source, checkpoint = converted
    architecture = asdict(distributed.read_description(checkpoint).architecture)
    architecture |= {"rope": {"rope_type": "default", "rope_theta": 9e6}, "max_position_embeddings": 512}
    edit_json(checkpoint / "checkpoint.json", architecture=architecture, step=100, digest=None)
    (checkpoint / "recipe.yaml").write_text("model: {}\n")
    to_hf(checkpoint, tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == 9e6 and config["max_position_embeddings"] == 512
    assert (tmp_path / "back" / "recipe.yaml").read_text() == "model: {}\n"
    with pytest.raises(UserError, match="logits differ"):  # the source has another RoPE
        main(["verify", "--hf", str(source), "--checkpoint", str(checkpoint)])


def test_verify_names_the_tensor_that_differs(converted):
    source, checkpoint = converted
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.self_attn.k_norm.weight"][3] += 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.k_norm\.weight: differs"):
        main(["verify", "--hf", str(source), "--checkpoint", str(checkpoint)])


def test_mixed_dtypes_stay_mixed(tmp_path):
    source = write_model("llama_3", tmp_path / "source", dtype=torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = torch.randn(32, dtype=torch.float32)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    main(["hf-to-megatron", "--hf", str(source), "--output", str(tmp_path / "checkpoint")])
    back = to_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert all(back[n].dtype == t.dtype and same_bits(back[n], t) for n, t in tensors.items())


def test_outputs_in_use_are_refused(converted, tmp_path):
    source, checkpoint = converted
    with pytest.raises(UserError, match="not empty"):
        main(["hf-to-megatron", "--hf", str(source), "--output", str(checkpoint)])
    with pytest.raises(UserError, match="not empty"):
        main(["megatron-to-hf", "--checkpoint", str(checkpoint), "--output", str(source)])


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        main(["megatron-to-hf", "--checkpoint", str(tmp_path), "--output", str(tmp_path / "out")])
