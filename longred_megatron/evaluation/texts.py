"""Texts for evaluation: documents from files, a model's own tokenizer, and windows of tokens."""

import hashlib
import json
import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from longred_megatron.data.documents import find_files, read_documents
from longred_megatron.data.skipped import Skipped, named
from longred_megatron.data.tokenizer import load_hugging_face
from longred_megatron.errors import UserError

# A document gives at most this many windows, so that one book does not fill the whole sample.
MAX_WINDOWS_PER_DOCUMENT = 4
# Where whole documents are too short, this many tokens for each one needed are read before documents are
# joined instead.
TOKENS_READ_PER_TOKEN_NEEDED = 8
# Upper end of characters per token, to cut a huge file before it is tokenised.
MAX_CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True)
class TextSource:
    """Files to draw documents from. `description` is for the report; `text_key` as in `read_documents`; `passed_over`:
    what beside them is no text file, for people."""

    files: tuple[Path, ...]
    description: str
    text_key: str = "text"
    passed_over: tuple[str, ...] = ()

    def documents(self, seed: int) -> Iterator[str]:
        """Every text in a seeded order of the files, those of one file in their own order. Raises
        `UserError` for a bad line."""
        files = list(self.files)
        random.Random(seed).shuffle(files)
        for file in files:
            yield from (document.text for document in read_documents(file, self.text_key))


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer without its special tokens, and the ones to place by hand.

    tokenizer: as transformers loads it; start: what it puts in front of every text by itself (a BOS token, or
    nothing); separator: its end-of-text token, or nothing; fingerprint: equal for two tokenizers that map the same
    vocabulary to the same numbers.
    """

    tokenizer: PreTrainedTokenizerBase
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    start: tuple[int, ...]
    separator: tuple[int, ...]
    fingerprint: str

    def chat(self, message: str, reply: str) -> list[int]:
        """A user's message in the tokenizer's chat template, up to where its reply begins with `reply`.

        Start and other special tokens are those that the template writes. Raises `UserError` where there is no
        template, or it fails.
        """
        flag, folder = "--chat-template", self.tokenizer.name_or_path
        if self.tokenizer.chat_template is None:
            raise UserError(f"{flag}: {folder} has none; leave the flag out, or name an instruction-tuned model first")
        dialogue = [{"role": "user", "content": message}]
        try:
            text = self.tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever the template's own code raises
            raise UserError(
                f"{flag}: that of {folder} takes no single user message ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:400]}); leave the flag out"
            ) from error
        return self.encode(f"{text}{reply}")


@dataclass(frozen=True)
class Windows:
    """tokens: [windows, window], each from one document, but for the last `num_joined` ones: cut from short
    documents in a row. documents: the number of each window's document; a joined window has one of its own."""

    tokens: Tensor
    documents: tuple[int, ...]
    num_joined: int = 0

    @property
    def num_documents(self) -> int:
        """Documents, a joined window counted as one."""
        return len(set(self.documents))


def text_source(paths: Sequence[Path], text_key: str = "text") -> TextSource:
    """The text files that `paths` name, see `find_files`. No paths: the Python standard library's sources.

    Raises `UserError` when a path is missing, is another kind of file, holds no text or is damaged.
    """
    if not paths:
        return _standard_library()
    skipped = Skipped()
    files = tuple(find_files(paths, skipped))
    if skipped.bad:
        raise UserError(*(f"{each}; fix or remove it" for each in named(skipped.bad)))
    return TextSource(files, ", ".join(map(str, paths)), text_key, tuple(named(skipped.others)))


def _standard_library() -> TextSource:
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idlelib", "encodings"}  # third-party code, and large tables
    files = sorted(file for file in root.rglob("*.py") if not skipped & set(file.parts))
    version = sysconfig.get_python_version()
    return TextSource(
        tuple(files), f"the Python {version} standard library's sources of this machine (no text was given)"
    )


def load_encoder(path: Path) -> TextEncoder:
    """The tokenizer of a Hugging Face folder. Raises `UserError` when there is none, or a damaged one."""
    try:
        return encoder_of(load_hugging_face(path))
    except UserError:
        raise
    except Exception as error:  # whatever transformers and tokenizers say of damaged files
        raise UserError(
            f"tokenizer {path}: cannot be used ({type(error).__name__}: {error}); its files are damaged"
        ) from error


def encoder_of(tokenizer: PreTrainedTokenizerBase) -> TextEncoder:
    """Wraps a transformers tokenizer; see `TextEncoder`."""
    around_nothing = tokenizer("").input_ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())) + json.dumps(around_nothing)
    return TextEncoder(
        tokenizer,
        encode=lambda text: tokenizer(text, add_special_tokens=False, verbose=False).input_ids,
        decode=tokenizer.decode,
        start=tuple(around_nothing[:1]) if bos is not None and around_nothing[:1] == [bos] else (),
        separator=() if eos is None else (eos,),
        fingerprint=hashlib.sha256(vocabulary.encode()).hexdigest(),
    )


def cut_windows(source: TextSource, encoder: TextEncoder, window: int, num_windows: int, seed: int) -> Windows:
    """Up to `num_windows` rows of exactly `window` tokens, each opened by the tokenizer's own start token
    where it has one.

    Windows are taken from documents at least that long, the first of every document before a second of any.
    Where these do not suffice, shorter documents are joined, with the end-of-text token between them. Raises
    `UserError` when not one window can be filled.
    """
    body = window - len(encoder.start)
    first: list[tuple[int, list[int]]] = []  # with the document's number
    later: list[tuple[int, list[int]]] = []
    joined: list[int] = []
    num_read = 0
    for number, text in enumerate(source.documents(seed)):
        tokens = encoder.encode(text[: body * MAX_WINDOWS_PER_DOCUMENT * MAX_CHARACTERS_PER_TOKEN])
        num_read += min(len(tokens), MAX_WINDOWS_PER_DOCUMENT * body)  # more of a document is no use
        whole = [(number, tokens[start : start + body]) for start in range(0, len(tokens) - body + 1, body)]
        first += whole[:1]
        later += whole[1:MAX_WINDOWS_PER_DOCUMENT]
        if not whole and len(joined) < num_windows * body:
            joined += [*tokens, *encoder.separator]
        num_filled = len(first) + len(later) + len(joined) // body
        has_read_enough = num_read >= TOKENS_READ_PER_TOKEN_NEEDED * num_windows * body
        if len(first) >= num_windows or (has_read_enough and num_filled >= num_windows):
            break
    whole = (first + later)[:num_windows]
    # Numbers below zero: no document's.
    rows = whole + [(-1 - start, joined[start : start + body]) for start in range(0, len(joined) - body + 1, body)]
    if not rows:
        raise UserError(
            f"texts too short: {source.description} gives {num_read} tokens, one window needs {window}; "
            "give more text (--text, --short-text, --long-text) or a smaller --window"
        )
    rows = rows[:num_windows]
    filled = torch.tensor([[*encoder.start, *row] for _, row in rows])
    return Windows(filled, tuple(number for number, _ in rows), num_joined=len(rows) - len(whole))
