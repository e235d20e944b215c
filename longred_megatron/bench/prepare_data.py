"""Texts to token files: tools/prepare_data.py against a plain loop over a tokenizer, by the number of processes."""

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from longred_megatron.bench.base import Case, Comparison, Facts, Side, Sizes
from longred_megatron.data.prepare import prepare
from longred_megatron.evaluation.texts import text_source

VOCABULARY = 16_384
TRAINING_CHARACTERS = 2_000_000  # of texts that the tokenizer learns from
END = "<end>"


class PrepareData(Comparison):
    """tools/prepare_data.py against a loop over the same tokenizer that writes ids to a file; by worker processes."""

    name = "prepare_data"

    def cases(self, sizes: Sizes, folder: Path) -> Iterator[Case]:
        texts = write_documents(folder / "texts.jsonl", sizes.text_bytes)
        tokenizer = write_tokenizer(folder / "tokenizer", texts)
        megabytes = texts.stat().st_size / 1e6
        cores = os.cpu_count() or 1
        for workers in sorted({1, 2, cores}):
            yield Case(
                f"{megabytes:.1f} MB of text, {workers} {'worker' if workers == 1 else 'workers'}",
                partial(Prepare, texts, tokenizer, folder / "ours", workers),
                partial(PlainLoop, texts, tokenizer, folder / "plain.bin"),
                megabytes,
                "MB",
                tolerance=0.0,
            )


class Prepare(Side):
    """The tool's function."""

    def __init__(self, texts: Path, tokenizer: Path, output: Path, workers: int) -> None:
        self._arguments = [texts], tokenizer, output
        self._workers, self._facts = workers, Facts()

    def once(self) -> None:
        report = prepare(*self._arguments, workers=self._workers, overwrite=True)
        self._facts = {"tokens": report.tokens, "documents": report.documents_kept}

    def facts(self) -> Facts:
        return self._facts


class PlainLoop(Side):
    """Line by line: parse, encode, append the ids and the end of document to a file."""

    def __init__(self, texts: Path, tokenizer: Path, output: Path) -> None:
        self._texts, self._output = texts, output
        self._tokenizer = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        self._facts = Facts()

    def once(self) -> None:
        end, tokens, documents = self._tokenizer.token_to_id(END), 0, 0
        with self._texts.open(encoding="utf-8") as lines, self._output.open("wb") as output:
            for line in lines:
                ids = self._tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
                np.array([*ids, end], dtype=np.uint16).tofile(output)
                tokens, documents = tokens + len(ids) + 1, documents + 1
        self._facts = {"tokens": tokens, "documents": documents}

    def facts(self) -> Facts:
        return self._facts


def write_documents(path: Path, num_bytes: int) -> Path:
    """A .jsonl of this Python's standard library, its files again and again until there are so many bytes."""
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < num_bytes:
            for text in text_source([]).documents(seed=0):
                written += file.write(json.dumps({"text": text}) + "\n") if text.strip() else 0
                if written >= num_bytes:
                    break
    return path


def write_tokenizer(folder: Path, texts: Path) -> Path:
    """A byte-level BPE learnt from the first of the texts, as a Hugging Face folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with texts.open(encoding="utf-8") as lines:
        learnt = [json.loads(line)["text"] for line in lines.readlines(TRAINING_CHARACTERS)]
    tokenizer.train_from_iterator(learnt, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)
    return folder
