"""Tiny random models and a byte-level tokenizer: one token a byte, so that lengths can be counted by hand."""

import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longred_megatron.evaluation.models import CausalModel, load_model, read_facts
from longred_megatron.evaluation.texts import load_encoder

WINDOW, LONGER_WINDOW = 128, 256


def byte_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<bos>", "<eos>"]
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(specials)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


def llama(window: int, hidden_size: int = 16, num_layers: int = 2, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=258, hidden_size=hidden_size, intermediate_size=32, num_hidden_layers=num_layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=window, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hugging Face folders: base (window 128), longer (256, other weights), wider, onebos (has a BOS)."""
    root = tmp_path_factory.mktemp("models")
    networks = {
        "base": llama(WINDOW),
        "longer": llama(LONGER_WINDOW, seed=1),
        "wider": llama(WINDOW, hidden_size=32),
        "onebos": llama(WINDOW),
    }
    for name, network in networks.items():
        network.save_pretrained(root / name)
        byte_tokenizer(bos=name == "onebos").save_pretrained(root / name)
    return {name: root / name for name in networks}


@pytest.fixture(scope="session")
def base(folders: dict[str, Path]) -> CausalModel:
    return loaded(folders["base"])


def loaded(path: Path) -> CausalModel:
    return load_model(read_facts(path), path.name, load_encoder(path), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One document of about 12,000 bytes, with no digit in it."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 8))) for _ in range(200)]
    path = tmp_path_factory.mktemp("texts") / "long.txt"
    path.write_text("\n".join(" ".join(rng.choices(words, k=10)) for _ in range(200)), encoding="utf-8")
    return path
