"""A Hugging Face model of which memory holds the layer that runs, so that its size does not matter."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longred_megatron.checkpoint.weight_files import WeightFiles
from longred_megatron.errors import UserError
from longred_megatron.families import read_architecture

ATTENTION = "given"
Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]


class Network:
    """transformers' modules, whose weights are read when they are asked for.

    A layer takes one keyword of ours, `attend`: its attention, [1, tokens, heads, head_dim] of query, key and value
    [1, heads or key/value heads, tokens, head_dim] and the scale of the scores.

    Raises:
        UserError: transformers does not know the model, or the folder's tensors are not those of its config.json.
    """

    def __init__(self, hf: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.hf, self.dtype, self.device = hf, dtype, device
        self.architecture = read_architecture(hf)
        with WeightFiles(hf) as files:
            files.check(self.architecture)
        try:
            self.config = AutoConfig.from_pretrained(hf, local_files_only=True, trust_remote_code=False)
            with torch.device("meta"):
                self._model = AutoModelForCausalLM.from_config(self.config, dtype=dtype).eval()
        except Exception as error:  # whatever transformers says of a damaged folder
            raise UserError(f"{hf}: transformers cannot make the model ({type(error).__name__}: {error})") from error
        self._model.config._attn_implementation = ATTENTION
        self._loaded: dict[str, nn.Module] = {}

    def embedding(self) -> Any:
        """Its weights replace the layer's."""
        return self._modules("model.embed_tokens")[0]

    def layer(self, number: int) -> Any:
        """Layer `number`, from 1. Its weights replace those of another layer, which then cannot run."""
        last = number == self.architecture.num_layers
        return self._modules(f"model.layers.{number - 1}", *last * ("model.norm", "lm_head"))[0]

    @property
    def norm(self) -> Any:
        """The final norm; with weights while the last layer has its own."""
        return self._model.model.norm

    @property
    def head(self) -> Any:
        """The language-model head; with weights while the last layer has its own."""
        return self._model.lm_head

    def rotary(self, rope: dict[str, Any] | None = None, max_position_embeddings: int | None = None) -> Any:
        """A new rotary module, the model's own or with other `rope_parameters` and window (tokens)."""
        config = copy.deepcopy(self.config)
        config.rope_parameters = dict(rope or config.rope_parameters)
        config.max_position_embeddings = max_position_embeddings or config.max_position_embeddings
        return type(self._model.model.rotary_emb)(config=config).to(self.device)

    def _modules(self, *names: str) -> list[nn.Module]:
        """These with their weights, and no others."""
        if self._loaded.keys() != set(names):
            for module in self._loaded.values():
                module.to("meta")
            self._loaded.clear()
            with WeightFiles(self.hf) as files:
                self._loaded = {name: self._with_weights(name, files) for name in names}
        return [self._loaded[name] for name in names]

    def _with_weights(self, name: str, files: WeightFiles) -> nn.Module:
        module = self._model.get_submodule(name)
        for each in module.modules():
            if dict(each.named_buffers(recurse=False)).keys() - each.state_dict().keys():  # computed, and in no file
                each.to_empty(device=self.device, recurse=False)
                self._model._init_weights(each)
        tensors = {}
        for each in module.state_dict():
            source = f"{name}.{each}"
            if source == self.architecture.head_name and self.architecture.tied_embeddings:
                source = self.architecture.embedding_name
            tensors[each] = files[source][:].to(self.device, self.dtype)
        module.load_state_dict(tensors, assign=True)
        return module


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, attend: Attention, **more: Any
) -> tuple[Tensor, None]:
    return attend(query, key, value, scaling), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)
