"""Tokenizers of Hugging Face folders and of sentencepiece, as far as preparing texts needs them."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from longred_megatron.errors import UserError
from longred_megatron.files import reason

# What decides how a Hugging Face folder turns text into tokens.
HUGGING_FACE_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip
MAX_VOCAB_SIZE = 2**31 - 1  # tokens are written as 32-bit integers


class Tokenizer(Protocol):
    """Text to token ids and back.

    No token is added that the text does not call for, and nothing is stripped: whatever a tokenizer's own
    normalisation keeps comes back from `decode`.
    """

    @property
    def end_of_document(self) -> int:
        """The id that ends each document."""

    @property
    def start_token(self) -> int | None:
        """The id that the tokenizer itself puts before a text; None: it puts none, or does not say."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, with added tokens."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


def load_tokenizer(path: Path) -> Tokenizer:
    """Loads the tokenizer of a Hugging Face folder, or a sentencepiece `.model` file. Nothing is downloaded.

    Raises: `UserError` if there is none at `path`, or it has no token to end a document with.
    """
    try:
        is_folder, is_file, exists = path.is_dir(), path.is_file(), path.exists()
    except OSError as error:
        raise UserError(f"tokenizer {str(path)!r}: cannot be read ({reason(error)})") from None
    if is_folder:
        return HuggingFaceTokenizer(path)
    if is_file and path.suffix == ".model":
        return SentencePieceTokenizer(path)
    found = "is another kind of file" if exists else "does not exist"
    raise UserError(f"tokenizer {path} {found}; give a Hugging Face model's folder or a sentencepiece .model file")


def load_hugging_face(folder: Path) -> Any:
    """transformers' tokenizer of a Hugging Face folder; code that lies in the folder is never run.

    Raises: `UserError` when transformers finds none there.
    """
    from transformers import AutoTokenizer  # here, because it takes seconds and sentencepiece needs none

    with _failing_as(f"tokenizer {folder}: transformers cannot load it", "a folder with a Hugging Face tokenizer"):
        for file in folder.iterdir():
            if file.exists() and not (file.is_file() or file.is_dir()):  # reading a FIFO would never end
                raise OSError(f"{file.name} is no regular file")
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


@contextmanager
def _failing_as(what: str, wanted: str) -> Iterator[None]:
    """Whatever fails in the block is a `UserError`: of damaged files the libraries raise nearly everything."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # a panic of `tokenizers` (Rust) is no Exception
        text = " ".join(str(error).split())[:400]
        if "trust_remote_code" in text:
            text = "it needs code that comes with it, which is never run"
        raise UserError(f"{what} ({type(error).__name__}: {text}); give {wanted}") from error


def _checked(path: Path, tokenizer: "Tokenizer") -> None:
    """Tries the tokenizer once. Raises `UserError` when it fails, or has ids that 32 bits do not hold."""
    tokenizer.encode("A short text, to try it.")
    if tokenizer.vocab_size > MAX_VOCAB_SIZE:
        raise UserError(
            f"tokenizer {path}: its largest id is {tokenizer.vocab_size - 1}, but token ids have to be less than "
            f"{MAX_VOCAB_SIZE}; give one that is whole"
        )


def file_digests(path: Path) -> dict[str, str]:
    """SHA-256 of each file that makes the tokenizer at `path`: name -> hexadecimal digest."""
    files = [path / name for name in HUGGING_FACE_FILES] if path.is_dir() else [path]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}


def check_same_tokenizer(hf: Path, teacher_hf: Path) -> None:
    """Checks that token ids mean the same to student and teacher.

    Raises: `UserError` with the `tokenizer_differences`.
    """
    if problems := tokenizer_differences(hf, teacher_hf):
        raise UserError(
            f"model.hf {hf} and teacher.hf {teacher_hf} have different tokenizers: {'; '.join(problems)}; "
            "the two are compared token by token: choose a teacher with the student's tokenizer"
        )


def tokenizer_differences(hf: Path, other_hf: Path) -> list[str]:
    """What differs in vocabulary, added tokens, begin and end tokens of two folders, each a phrase.

    A folder without a tokenizer differs in nothing: there is nothing to compare.

    Raises: `UserError` if transformers cannot load one of them.
    """
    digests = file_digests(hf), file_digests(other_hf)
    if not all(digests) or digests[0] == digests[1]:
        return []
    ours, theirs = load_hugging_face(hf), load_hugging_face(other_hf)
    problems = []
    entries = sorted(set(ours.get_vocab().items()) ^ set(theirs.get_vocab().items()), key=lambda entry: entry[::-1])
    if entries:
        listed = ", ".join(f"{token!r} is {number}" for token, number in entries[:4])
        problems.append(f"{len(entries)} entries are in one vocabulary only ({listed})")
    problems += [
        f"{name} is {getattr(ours, name)!r} and {getattr(theirs, name)!r}"
        for name in ("bos_token", "eos_token")
        if getattr(ours, name) != getattr(theirs, name)
    ]
    return problems


class HuggingFaceTokenizer:
    """A transformers tokenizer; documents end with its end-of-sequence token.

    A special token spelled out in a text ("<|eot_id|>" in a chat) becomes that token, as in transformers.
    """

    def __init__(self, folder: Path) -> None:
        self._tokenizer = load_hugging_face(folder)
        self._path = folder
        with _failing_as(f"tokenizer {folder}: its vocabulary cannot be read", "one that is whole"):
            self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
            eos_token_id = self._tokenizer.eos_token_id
            around_nothing = self._tokenizer("").input_ids
        if eos_token_id is None:
            raise UserError(
                f"tokenizer {folder} has no end-of-sequence token to end documents with; "
                "name one as eos_token in its tokenizer_config.json"
            )
        self.end_of_document: int = eos_token_id
        starts = bool(around_nothing) and around_nothing[0] == self._tokenizer.bos_token_id
        self.start_token: int | None = around_nothing[0] if starts else None
        _checked(folder, self)

    def encode(self, text: str) -> list[int]:
        with _failing_as(f"tokenizer {self._path}: fails on a text of {len(text)} characters", "one that is whole"):
            # verbose=False: no warning for texts longer than the model's window, of which long sets are made.
            return self._tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # one list of ids gives one text
        return text


class SentencePieceTokenizer:
    """A sentencepiece model; documents end with its end of sentence. Control pieces in texts are text.

    Whether texts open with its begin of sentence is for whoever runs the model to say: it has no `start_token`.
    """

    start_token = None

    def __init__(self, model_file: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        with _failing_as(f"tokenizer {model_file}: sentencepiece cannot load it", "a trained .model file"):
            self._processor = SentencePieceProcessor(model_file=str(model_file))
        self._path = model_file
        self.end_of_document: int = self._processor.eos_id()
        if self.end_of_document < 0:
            raise UserError(
                f"tokenizer {model_file} has no end-of-sentence piece to end documents with (eos_id -1); "
                "train it with an eos_id"
            )
        self.vocab_size: int = self._processor.get_piece_size()
        _checked(model_file, self)

    def encode(self, text: str) -> list[int]:
        with _failing_as(f"tokenizer {self._path}: fails on a text of {len(text)} characters", "one that is whole"):
            return self._processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)
