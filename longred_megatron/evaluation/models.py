"""A causal language model loaded for evaluation, and its logits a few positions at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig

from longred_megatron.checkpoint.causal_model import load_causal_model
from longred_megatron.device import cpu_is_forced
from longred_megatron.dtypes import TORCH_DTYPES
from longred_megatron.errors import UserError
from longred_megatron.evaluation.texts import TextEncoder
from longred_megatron.families.config_checks import LARGEST, ignored_keys, number_problems, size_problems
from longred_megatron.files import read_json

# Positions whose logits exist at once, in fp32: 1024 x 128,256 x 4 bytes = 0.5 GB for a vocabulary as large
# as Llama 3's.
CHUNK_TOKENS = 1024
MAX_CONFIG_BYTES = 10_000_000  # the largest known have thousands


@dataclass(frozen=True)
class ModelFacts:
    """What config.json says of a model, before any weight is read."""

    path: Path
    family: str
    max_position_embeddings: int
    rope: dict[str, Any] | None
    num_layers: int
    hidden_size: int


@dataclass(frozen=True)
class CausalModel:
    """A model ready to be measured. `head_is_plain`: its logits are exactly output_embeddings(last hidden
    state)."""

    name: str
    facts: ModelFacts
    network: nn.Module
    encoder: TextEncoder
    device: torch.device
    head_is_plain: bool

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())

    def logit_chunks(self, tokens: Tensor, last: int, chunk_tokens: int = CHUNK_TOKENS) -> Iterator[Tensor]:
        """Logits at the last `last` positions of every row, in fp32, a few positions at a time.

        tokens: [n, s] on the model's device. Yields [chunk, vocabulary] over the n * last positions, row by
        row, which the caller may write over. Only hidden states are kept for the whole window; a model that
        does more than a linear map to its last hidden states (scaled or capped logits) makes its own logits,
        in its own precision, and only their conversion to fp32 is chunked.
        """
        if self.head_is_plain:
            network: Any = self.network
            states = network.base_model(input_ids=tokens, use_cache=False).last_hidden_state[:, -last:]
            head = network.get_output_embeddings()
        else:
            states = self.network(input_ids=tokens, use_cache=False).logits[:, -last:]
            head = nn.Identity()
        for chunk in states.flatten(0, 1).split(chunk_tokens):
            yield head(chunk).float()

    @torch.inference_mode()
    def continuations(self, tokens: Tensor, num_new_tokens: int) -> list[str]:
        """What greedy decoding writes after each row: at most `num_new_tokens` tokens, as text, without the token that
        ended it.

        tokens: [n, s] on the model's device, without padding. Keys and values are kept; logits exist at one
        position a row.
        """
        network: Any = self.network
        written = network.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=num_new_tokens, do_sample=False
        )[:, tokens.shape[1] :].tolist()
        ends = network.generation_config.eos_token_id or ()
        return [self.encoder.decode(list(takewhile(lambda token: token not in ends, row))) for row in written]


def read_facts(path: Path) -> ModelFacts:
    """Reads the config of a Hugging Face folder. Raises `UserError` when it is no folder or not a causal
    language model's."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; --hf takes folders that hold a Hugging Face model")
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: has no config.json; give the folder of a Hugging Face model")
    if (size := (path / "config.json").stat().st_size) > MAX_CONFIG_BYTES:
        raise UserError(f"{path}/config.json: has {size:,} bytes; a model's settings have at most {MAX_CONFIG_BYTES:,}")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        text_config = config.get_text_config()
    except Exception as error:  # whatever transformers says of a damaged file
        raise UserError(
            f"{path}/config.json: transformers cannot read it ({type(error).__name__}: {error}); "
            "give a causal language model"
        ) from error
    window = getattr(text_config, "max_position_embeddings", None)
    if not isinstance(window, int) or isinstance(window, bool):
        raise UserError(f"{path}/config.json: max_position_embeddings is missing; state the model's window there")
    sizes = {key: getattr(text_config, key, None) for key in LARGEST}
    found = [
        *size_problems(sizes),
        *number_problems(text_config),
        *ignored_keys(read_json(path / "config.json"), config),
    ]
    problems = [f"{path}/config.json: {each}" for each in found]
    if getattr(config, "quantization_config", None) is not None:
        problems.append(
            f"{path}/config.json: has quantization_config; only plain weights can be measured, remove it if they are"
        )
    if problems:
        raise UserError(*problems)
    return ModelFacts(
        path=path,
        family=config.model_type,
        max_position_embeddings=window,
        rope=getattr(text_config, "rope_parameters", None),
        num_layers=text_config.num_hidden_layers,
        hidden_size=text_config.hidden_size,
    )


def resolve_device(device: str) -> torch.device:
    """`auto` is CUDA where there is a GPU, and the CPU is not forced; Transformer Engine is not needed.

    Raises `UserError` when CUDA is asked for and there is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and not cpu_is_forced() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: this machine has no CUDA GPU that torch can use; use --device cpu or leave it out"
        )
    return torch.device(device)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on a CPU. Raises `UserError` for an unknown name."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in TORCH_DTYPES:
        raise UserError(f"--dtype {dtype}: unknown; use auto, {', '.join(TORCH_DTYPES)}")
    return TORCH_DTYPES[dtype]


def load_model(
    facts: ModelFacts, name: str, encoder: TextEncoder, device: torch.device, dtype: torch.dtype
) -> CausalModel:
    """Loads the weights of a folder; see `load_causal_model`."""
    network = load_causal_model(facts.path, dtype).to(device)
    network.generation_config = _greedy_config(network.generation_config, encoder)
    return CausalModel(name, facts, network, encoder, device, head_is_plain(network, device))


def _greedy_config(own: GenerationConfig, encoder: TextEncoder) -> GenerationConfig:
    """For greedy decoding. Of the folder's `own`, which may ask for sampling or for penalties, only the tokens that
    end a text are kept, beside the tokenizer's."""
    named = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = sorted({*encoder.separator, *(token for token in named if isinstance(token, int))})
    return GenerationConfig(eos_token_id=ends or None, pad_token_id=ends[0] if ends else None)


@torch.inference_mode()
def head_is_plain(network: nn.Module, device: torch.device) -> bool:
    """Whether the output embeddings on the last hidden states give the model's own logits.

    Measured on eight tokens instead of read from the config, so it holds for any architecture: true for
    Llama, Mistral and Qwen, false for models that scale or cap their logits (Cohere, Granite, Gemma 2) or
    that hide their layers from transformers' `base_model`.
    """
    base = getattr(network, "base_model", network)
    if base is network:
        return False
    probe = torch.arange(8, device=device)[None]
    states = getattr(base(input_ids=probe, use_cache=False), "last_hidden_state", None)
    head = network.get_output_embeddings()  # type: ignore[operator]
    if states is None or head is None:
        return False
    logits = network(input_ids=probe, use_cache=False).logits
    from_head = head(states)
    return from_head.shape == logits.shape and torch.allclose(from_head.float(), logits.float(), rtol=1e-3, atol=1e-3)
