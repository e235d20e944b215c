"""Small tokenizers trained on the spot, and indexed data sets of known tokens."""

import inspect
import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.evaluation.conftest import byte_tokenizer

WriteIndexed = Callable[[Path, Sequence[Sequence[int]]], str]


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """A few kilobytes of real text, in paragraphs."""
    return [part for part in inspect.getsource(textwrap).split("\n\n") if part.strip()]


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> Path:
    """400 pieces; white space is kept as it is (no normalisation, no added space)."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    lines = [line for text in corpus for line in text.splitlines() if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "small"), vocab_size=400, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=False, character_coverage=0.98, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return folder / "small.model"


@pytest.fixture(scope="session")
def hf_tokenizer(tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> Path:
    """The folder of a byte-level BPE of 300 entries and one added token, <|end|>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    folder = tmp_path_factory.mktemp("hf")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    return folder


@pytest.fixture
def write_indexed() -> WriteIndexed:
    """A function that writes documents (lists of ids) as an indexed data set, and returns its prefix."""

    def write(prefix: Path, documents: Sequence[Sequence[int]]) -> str:
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
        for document in documents:
            builder.add_document(np.array(document), [len(document)])
        builder.finalize(f"{prefix}.idx")
        return str(prefix)

    return write


@pytest.fixture
def jsonl(tmp_path: Path, corpus: list[str]) -> Path:
    """The corpus as texts.jsonl, one paragraph a line."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus))
    return path


@pytest.fixture(scope="session")
def bos_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer of bytes that opens every text with token 0."""
    folder = tmp_path_factory.mktemp("bos")
    byte_tokenizer(bos=True).save_pretrained(folder)
    return folder
