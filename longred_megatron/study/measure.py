"""What is measured of the models of a study: of every model the same windows and prompts, each kept beside it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from longred_megatron.errors import UserError
from longred_megatron.evaluation.corpus import Corpus, build_corpus
from longred_megatron.evaluation.evaluate import TOKENS_PER_BATCH
from longred_megatron.evaluation.measure import SIMILARITY_WINDOWS
from longred_megatron.evaluation.models import CausalModel, load_model, read_facts, resolve_device, resolve_dtype
from longred_megatron.evaluation.perplexity import token_losses
from longred_megatron.evaluation.settings import Settings
from longred_megatron.evaluation.similarity import hidden_state_similarity, why_not_comparable
from longred_megatron.evaluation.tasks import chosen_tasks
from longred_megatron.evaluation.tasks.base import Options
from longred_megatron.evaluation.tasks.results import measure_task
from longred_megatron.evaluation.texts import Windows, load_encoder, text_source
from longred_megatron.files import read_json, write_text
from longred_megatron.study.settings import Evaluation


@dataclass(frozen=True)
class Measured:
    """Of one model. key: of the texts, prompts, settings, the original's files and its own.

    short, long: mean loss of each document's windows, nats a token. prompts: length -> score of each prompt, 0 to 1,
    task after task. similarity: mean cosine of its hidden states to the original's on short texts; None where it
    has another width or depth.
    """

    key: str
    short: list[float]
    long: list[float]
    prompts: dict[int, list[float]]
    similarity: float | None

    def units(self, measure: str) -> list[float]:
        """short, long: loss by document; retrieval: scores of the longest prompts."""
        losses = {"short": self.short, "long": self.long}
        return losses[measure] if measure in losses else self.prompts[max(self.prompts)]


class Measurer:
    """Measures models against `original`; windows and prompts are cut once, for the longest of `models`.

    Raises UserError for texts that are too short, and models with another tokenizer than the original's.
    """

    def __init__(self, original: Path, models: Sequence[Path], evaluation: Evaluation) -> None:
        facts = read_facts(original)
        self._encoder = load_encoder(original)
        window = max(read_facts(each).max_position_embeddings for each in (original, *models))
        settings = Settings(
            short_texts=evaluation.short_texts,
            long_texts=evaluation.long_texts,
            num_short_windows=evaluation.short_windows,
            num_long_windows=evaluation.long_windows,
            lengths=evaluation.lengths,
            num_depths=evaluation.depths,
            num_prompt_sets=evaluation.prompt_sets,
            num_samples=evaluation.samples,
            seed=evaluation.seed,
        )
        if problems := settings.problems():
            raise UserError(*problems)
        tasks, _ = chosen_tasks(settings.tasks, Options())
        short, long = (text_source(texts, settings.text_key) for texts in (settings.short_texts, settings.long_texts))
        grid = settings.grid(facts.max_position_embeddings, window)
        self.corpus: Corpus = build_corpus(
            self._encoder, short, long, facts.max_position_embeddings, window, tasks, grid, settings
        )
        self._seed = evaluation.seed
        self._device = resolve_device("auto")
        self._dtype = resolve_dtype("auto", self._device)
        self._tokens_per_batch = TOKENS_PER_BATCH[self._device.type]
        self._key = f"{self._fingerprint()}-{_files_key(original)}"
        self._original = self._load(original)

    def measure(self, hf: Path, output: Path) -> Measured:
        """The figures of the model in `hf`, out of `output` where they are there, of the same files and texts."""
        key = f"{self._key}-{_files_key(hf)}"
        if (known := read_measured(output, key)) is not None:
            return known
        model = self._load(hf)
        measured = Measured(
            key,
            self._losses(model, self.corpus.short),
            self._losses(model, self.corpus.long),
            self._scores(model),
            self._similarity(model),
        )
        write_text(output, json.dumps(asdict(measured)) + "\n")
        return measured

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for tokens in (self.corpus.short.tokens, self.corpus.long.tokens):
            digest.update(tokens.numpy().tobytes())
        digest.update(repr([(task.name, prompts) for task, prompts in self.corpus.prompts.items()]).encode())
        digest.update(repr(self._dtype).encode())
        return digest.hexdigest()

    def _load(self, hf: Path) -> CausalModel:
        encoder = load_encoder(hf)
        if encoder.fingerprint != self._encoder.fingerprint:
            raise UserError(f"{hf}: has another tokenizer than the original; the models of a study need the same")
        return load_model(read_facts(hf), hf.parent.parent.name, encoder, self._device, self._dtype)

    @torch.inference_mode()
    def _losses(self, model: CausalModel, windows: Windows) -> list[float]:
        batches = windows.tokens.split(max(1, self._tokens_per_batch // windows.tokens.shape[1]))
        of_windows = torch.cat([token_losses(model, batch).double().mean(dim=1) for batch in batches])
        documents = torch.tensor(windows.documents)
        return [of_windows[documents == document].mean().item() for document in documents.unique()]

    def _scores(self, model: CausalModel) -> dict[int, list[float]]:
        scores: dict[int, list[float]] = {}
        for task, prompts in self.corpus.prompts.items():
            for cell in measure_task(model, task, prompts, self._tokens_per_batch, self._seed).cells:
                scores.setdefault(cell.length, []).extend(cell.scores)
        return scores

    def _similarity(self, model: CausalModel) -> float | None:
        if why_not_comparable(model, self._original) is not None:
            return None
        tokens = self.corpus.short.tokens[:SIMILARITY_WINDOWS]
        return hidden_state_similarity(model, self._original, tokens, self._tokens_per_batch).mean


def _files_key(hf: Path) -> str:
    """Another one when a file of the model is written again."""
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(hf.iterdir())]
    return hashlib.sha256(repr(states).encode()).hexdigest()


def read_measured(path: Path, key: str) -> Measured | None:
    """The figures in a file of `Measurer.measure`; None where it is not there, or of another key."""
    try:
        values = read_json(path)
        values["prompts"] = {int(length): scores for length, scores in values["prompts"].items()}
        found = Measured(**values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return found if found.key == key else None
