"""Evaluation: loss of windows and answers to prompts, against transformers one window or prompt at a time."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from longred_megatron.bench.base import TOLERANCES, Case, Comparison, Facts, Side, Sizes
from longred_megatron.bench.inputs import write_llama
from longred_megatron.bench.prepare_data import write_documents, write_tokenizer
from longred_megatron.evaluation.evaluate import TOKENS_PER_BATCH
from longred_megatron.evaluation.models import load_model, read_facts, resolve_device, resolve_dtype
from longred_megatron.evaluation.perplexity import measure_losses
from longred_megatron.evaluation.tasks.base import Generation, Options, Place, Prompt
from longred_megatron.evaluation.tasks.results import measure_task
from longred_megatron.evaluation.texts import Windows, load_encoder
from longred_megatron.families import read_architecture

NEW_TOKENS = 16  # of an answer, as most of RULER's tasks have less than 64
FORMATS = {dtype: name for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}


class Evaluation(Comparison):
    """Perplexity and answers of the evaluator against plain transformers: forward with labels, and `generate`."""

    name = "evaluation"

    def cases(self, sizes: Sizes, folder: Path) -> Iterator[Case]:
        texts = write_documents(folder / "texts.jsonl", 100_000)
        hf = write_llama(write_tokenizer(folder / "model", texts), sizes, sizes.twin_layers)
        architecture = read_architecture(hf)
        device = resolve_device("auto")
        params = FORMATS[resolve_dtype("auto", device)]
        for length in (sizes.sequence_length // 4, sizes.sequence_length):
            tokens = sizes.prompts * length
            per_token = architecture.forward_flops_per_token(sizes.twin_layers, length, head=True)
            yield Case(
                f"loss of windows of {length}, {params}",
                partial(OurLosses, hf, sizes, length),
                partial(PlainLosses, hf, sizes, length),
                tokens,
                "tokens",
                tokens * per_token,
                params,
                TOLERANCES[params],
            )
        length = sizes.sequence_length // 4
        yield Case(
            f"{NEW_TOKENS} new tokens after {length}, {params}",
            partial(OurAnswers, hf, sizes, length),
            partial(PlainAnswers, hf, sizes, length),
            sizes.prompts * (length + NEW_TOKENS),
            "tokens",
            dtype=params,
        )


def random_tokens(sizes: Sizes, length: int) -> Tensor:
    """[prompts, length]; without the first entries, where a tokenizer's special tokens are."""
    return torch.randint(8, sizes.vocabulary, (sizes.prompts, length), generator=torch.Generator().manual_seed(0))


class _Ours(Side):
    def __init__(self, hf: Path, sizes: Sizes, length: int) -> None:
        device = resolve_device("auto")
        self._model = load_model(read_facts(hf), "model", load_encoder(hf), device, resolve_dtype("auto", device))
        self._tokens_per_batch = TOKENS_PER_BATCH[device.type]
        self._tokens, self._facts = random_tokens(sizes, length), Facts()

    def facts(self) -> Facts:
        return self._facts


class OurLosses(_Ours):
    """As tools/evaluate.py measures them: batches of windows, logits a chunk at a time, losses by position."""

    def once(self) -> None:
        windows = Windows(self._tokens, tuple(range(len(self._tokens))))
        losses = measure_losses(self._model, windows, self._tokens_per_batch, "windows")
        self._facts = {"loss": float(losses.of_windows.mean())}


class OurAnswers(_Ours):
    """As tools/evaluate.py asks its tasks: prompts of equal length in batches."""

    def once(self) -> None:
        rows = enumerate(self._tokens.tolist())
        length = self._tokens.shape[1] + NEW_TOKENS
        prompts = [Prompt("echo", 0, length, None, i, tuple(row), ("nothing",)) for i, row in rows]
        measure_task(self._model, _Echo(Options()), prompts, self._tokens_per_batch)


class _Echo(Generation):
    """A task whose answers are never right, but written."""

    name = "echo"
    title = score_meaning = rule = "share of prompts that are answered with nothing"
    num_new_tokens = NEW_TOKENS

    def prompt(self, place: Place) -> Prompt | None:
        return None

    def score(self, prompt: Prompt, text: str) -> float:
        return float(text in prompt.expected)


class _Plain(Side):
    def __init__(self, hf: Path, sizes: Sizes, length: int) -> None:
        device = resolve_device("auto")
        dtype = resolve_dtype("auto", device)
        self._network: Any = AutoModelForCausalLM.from_pretrained(hf, dtype=dtype).to(device).eval()
        self._tokens = random_tokens(sizes, length).to(device)
        self._facts = Facts()

    def facts(self) -> Facts:
        return self._facts


class PlainLosses(_Plain):
    """A window at a time, with all its logits; the mean loss that transformers returns."""

    @torch.inference_mode()
    def once(self) -> None:
        losses = [self._network(row, labels=row).loss for row in self._tokens.split(1)]
        self._facts = {"loss": float(torch.stack(losses).mean())}


class PlainAnswers(_Plain):
    """`generate`, a prompt at a time."""

    @torch.inference_mode()
    def once(self) -> None:
        for row in self._tokens.split(1):
            self._network.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=NEW_TOKENS, do_sample=False)
