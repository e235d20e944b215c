"""Damaged and hostile model folders: one message, no code run, nothing measured."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longred_megatron.checkpoint.causal_model import load_causal_model
from longred_megatron.errors import UserError
from longred_megatron.evaluation.evaluate import evaluate
from longred_megatron.evaluation.models import read_facts
from longred_megatron.evaluation.report import check_output
from longred_megatron.evaluation.settings import Settings
from longred_megatron.evaluation.texts import load_encoder

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(folders["base"], tmp_path / "model")


def change_weights(folder: Path, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights.pop(NAME),
        lambda weights: weights.update({NAME: torch.zeros(3, 3)}),
        lambda weights: weights.update({NAME + "_more": torch.zeros(3)}),
        lambda weights: weights[NAME][0].fill_(torch.nan),
        lambda weights: weights[NAME][0].fill_(torch.inf),
    ],
    ids=["missing", "another shape", "unexpected", "NaN", "infinite"],
)
def test_no_random_or_damaged_weights_are_measured(folder: Path, change: Any) -> None:
    change_weights(folder, change)
    with pytest.raises(UserError, match=NAME):
        load_causal_model(folder, torch.float32)


def test_a_tied_head_and_stored_frequencies_are_no_problem(folder: Path) -> None:
    change_config(folder, tie_word_embeddings=True)
    change_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    change_weights(
        folder, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    )
    load_causal_model(folder, torch.float32)


def test_a_tensor_in_two_shards_is_told(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "first.safetensors", metadata={"format": "pt"})
    save_file({NAME: weights[NAME]}, folder / "second.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(weights, "first.safetensors") | {"lm_head.weight": "second.safetensors"}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match=rf"both hold the tensor {NAME}"):
        load_causal_model(folder, torch.float32)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", 0),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", -1),
        ("hidden_size", 10**15),
        ("max_position_embeddings", 10**15),
        ("vocab_size", "many"),
        ("rms_norm_eps", -1e-6),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 0}),
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    ],
)
def test_absurd_settings_are_told_at_once(folder: Path, key: str, value: Any) -> None:
    change_config(folder, **{key: value})
    with pytest.raises(UserError, match=r"config\.json"):
        read_facts(folder)


def test_rope_may_have_switches(folder: Path) -> None:
    change_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_interleaved": True})
    assert read_facts(folder).rope is not None


def test_whole_numbers_are_no_weights(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update({NAME: weights[NAME].to(torch.int32)}))
    with pytest.raises(UserError, match=rf"{NAME} \(I32\): weights must be floating-point"):
        load_causal_model(folder, torch.float32)


@pytest.mark.parametrize("text", ["[]", "null", "[" * 100_000, "{" + "1" * 20_000_000, "\0", '{"model_type": []}'])
def test_damaged_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json"):
        read_facts(folder)


@pytest.mark.parametrize("kind", ["auto_map", "unknown model_type"])
def test_no_code_of_the_folder_runs(folder: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even when the user would answer yes."""
    payload = tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(payload)!r}, 'w')\nclass Config: pass\n", encoding="utf-8")
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Config"}
    change_config(folder, auto_map=auto_map, **({"model_type": "mine"} if kind != "auto_map" else {}))
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")
    try:
        read_facts(folder)
        load_causal_model(folder, torch.float32)
    except UserError:
        pass
    assert not payload.exists()


@pytest.mark.parametrize("place", ["file/below", "x" * 300, "nul\0", "link"])
def test_the_output_is_tried_before_any_model_is_read(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match="--output"):
        check_output(tmp_path / place)


@pytest.mark.parametrize("name", ["num_depths", "num_samples", "num_keys", "num_long_windows", "tokens_per_batch"])
@pytest.mark.parametrize("value", [-1, 10**15])
def test_absurd_numbers_are_told(name: str, value: int) -> None:
    [problem] = Settings(**{name: value}).problems()
    assert name.removeprefix("num_").replace("_", "-") in problem


def test_windows_and_prompts_have_bounds() -> None:
    assert Settings(extended_window=10**15, lengths=(10**15,)).problems()
    assert Settings(seed=-1).problems()
    assert Settings(num_depths=1000, num_samples=10_000).problems()


def test_a_full_disk_does_not_lose_the_numbers(
    folders: dict[str, Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("longred_megatron.evaluation.evaluate.write_text", full)
    shown: list[object] = []
    settings = Settings(
        (text_file,), (text_file,), "text", 64, 256, 2, 2, (256,), num_depths=1, num_samples=1, device="cpu"
    )
    with pytest.raises(OSError, match="No space"):
        evaluate([folders["base"]], tmp_path, settings=settings, show=shown.append)
    assert shown


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_is_told(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="tokenizer"):
        load_encoder(folder)
