"""Merged models against plain torch, and folders that cannot be merged."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from longred_megatron.checkpoint import merging
from longred_megatron.errors import UserError
from tests.checkpoint.small_models import MODELS, edit_json, write_model
from tests.evaluation.conftest import byte_tokenizer
from tools.merge import main


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def write_pair(folder: Path, model: str = "llama_3", **save: object) -> tuple[Path, Path]:
    """A model, and one with other weights, another dtype and a longer window."""
    original = write_model(model, folder / "original")
    extended = write_model(model, folder / "extended", torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(extended)
    generator = torch.Generator().manual_seed(5)
    for parameter in loaded.parameters():
        parameter.data += torch.empty(parameter.shape).normal_(0.0, 0.2, generator=generator).to(parameter.dtype)
    shutil.rmtree(extended)
    loaded.config.max_position_embeddings *= 4
    loaded.save_pretrained(extended, **save)
    return original, extended


def merge(pair: tuple[Path, Path], output: Path, *arguments: str) -> None:
    main(["--hf", *map(str, pair), "--output", str(output), *arguments])


def plain_slerp(x: Tensor, y: Tensor, weight: float) -> Tensor:
    x, y = x.double(), y.double()
    angle = torch.acos(torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), dim=0))
    return (torch.sin((1 - weight) * angle) * x + torch.sin(weight * angle) * y) / torch.sin(angle)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", ["linear", "spherical"])
def test_equals_plain_torch_and_loads_in_transformers(model: str, method: str, tmp_path: Path) -> None:
    pair = write_pair(tmp_path, model)
    merge(pair, tmp_path / "merged", "--method", method, "--weight", "0.3")
    x, y, merged = (tensors_of(folder) for folder in (*pair, tmp_path / "merged"))
    assert merged.keys() == y.keys()
    for name, tensor in merged.items():
        between = torch.lerp(x[name].double(), y[name].double(), 0.3)
        expected = plain_slerp(x[name], y[name], 0.3) if method == "spherical" else between
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.double(), expected, rtol=2**-8, atol=1e-6)
        if method == "spherical":  # the two methods are told apart
            assert (expected - between).abs().max() > 0.001
    loaded, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert loaded.config.max_position_embeddings == 4 * 64
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_a_sweep_of_sharded_models_by_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "BLOCK_ELEMENTS", 100)  # a few rows
    pair = write_pair(tmp_path, max_shard_size="20KB")
    assert (pair[1] / "model.safetensors.index.json").exists()
    (pair[1] / "notes.txt").write_text("kept")
    merge(pair, tmp_path / "sweep", "--weight", "0", "0.5", "1")
    x, y = map(tensors_of, pair)
    for weight in (0.0, 0.5, 1.0):
        folder = tmp_path / "sweep" / f"weight-{weight:g}"
        found = tensors_of(folder)
        for name in y:
            assert torch.equal(found[name], ((1 - weight) * x[name] + weight * y[name].float()).bfloat16()), name
        assert json.loads((folder / "merge.json").read_text())["weight"] == weight
        assert (folder / "notes.txt").read_text() == "kept"
        assert (folder / "config.json").read_bytes() == (pair[1] / "config.json").read_bytes()
        AutoModelForCausalLM.from_pretrained(folder)


def test_tensors_that_are_parallel_opposite_or_zero_are_merged_linearly(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    changes = {"model.norm.weight": 2.0, "model.layers.0.mlp.up_proj.weight": -1.0, "lm_head.weight": 0.0}
    y = tensors_of(pair[1])
    x = {name: y[name].float() * changes.get(name, 1.0) for name in y}
    save_file(x, pair[0] / "model.safetensors", metadata={"format": "pt"})
    merge(pair, tmp_path / "merged", "--method", "spherical", "--weight", "0.25")
    merged = tensors_of(tmp_path / "merged")
    for name, tensor in merged.items():
        assert torch.equal(tensor, (0.75 * x[name] + 0.25 * y[name].float()).bfloat16()), name


def test_mixed_dtypes_and_a_written_out_tied_head(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "qwen2_tied")
    y = tensors_of(pair[1]) | {"model.norm.weight": torch.ones(32)}
    y["lm_head.weight"] = y["model.embed_tokens.weight"].clone()
    save_file(y, pair[1] / "model.safetensors", metadata={"format": "pt"})
    merge(pair, tmp_path / "merged", "--weight", "0.5")
    merged = tensors_of(tmp_path / "merged")
    assert "lm_head.weight" not in merged  # config.json ties it
    assert merged["model.norm.weight"].dtype == torch.float32
    assert torch.equal(merged["model.norm.weight"], 0.5 * tensors_of(pair[0])["model.norm.weight"] + 0.5)


def test_angles_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = write_pair(tmp_path)
    merge(pair, tmp_path / "merged", "--weight", "0.5")
    x, y = map(tensors_of, pair)
    angles = {
        n: math.degrees(math.acos(torch.cosine_similarity(x[n].flatten().double(), y[n].flatten().double(), 0)))
        for n in y
    }
    name = max(angles, key=lambda each: angles[each])
    assert f"at most {angles[name]:.2g} degrees apart ({name})" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weight", "1.5"], "--weight 1.5: must be 0 to 1"),
        (["--weight", "nan"], "--weight nan: must be 0 to 1"),
        (["--weight", "0.3", "0.30"], "given twice"),
    ],
)
def test_weights_out_of_range(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        merge(write_pair(tmp_path), tmp_path / "merged", *arguments)
    assert not (tmp_path / "merged").exists()


def test_models_that_are_not_two_states_of_one(tmp_path: Path) -> None:
    original, extended = write_pair(tmp_path)
    wide = write_model("llama_3", tmp_path / "wide", sizes={"intermediate_size": 64})
    qwen = write_model("qwen2", tmp_path / "qwen")
    for other, message in ((wide, "intermediate_size is 64 and 48"), (qwen, "family is 'qwen2' and 'llama'")):
        with pytest.raises(UserError, match=f"{other} and {extended} cannot be merged: .*{message}"):
            merge((other, extended), tmp_path / "merged", "--weight", "0.5")
    with pytest.raises(UserError, match="they are one folder"):
        merge((original, original), tmp_path / "merged", "--weight", "0.5")
    for folder, words in ((original, ["<a>"]), (extended, ["<b>"])):
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens(words)
        tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="cannot be merged: 2 entries are in one vocabulary only"):
        merge((original, extended), tmp_path / "merged", "--weight", "0.5")
    assert not (tmp_path / "merged").exists()


def test_an_output_in_use_and_a_damaged_model_leave_nothing(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    (tmp_path / "sweep" / "weight-0.5").mkdir(parents=True)
    (tmp_path / "sweep" / "weight-0.5" / "mine").write_text("")
    with pytest.raises(UserError, match=r"weight-0\.5: exists and is not empty"):
        merge(pair, tmp_path / "sweep", "--weight", "0.2", "0.5")
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["weight-0.5"]
    x = tensors_of(pair[0])
    x["model.norm.weight"][3] = math.nan
    save_file(x, pair[0] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight holds 1 NaN"):
        merge(pair, tmp_path / "merged", "--weight", "0.5")
    edit_json(pair[0] / "config.json", num_hidden_layers=5)
    with pytest.raises(UserError, match="num_layers is 5 and 4"):
        merge(pair, tmp_path / "merged", "--weight", "0.5")
    assert not list(tmp_path.glob("*merged*"))
