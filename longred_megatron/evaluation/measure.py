"""All measurements of one model."""

from collections.abc import Sequence
from dataclasses import dataclass

from longred_megatron.evaluation.benchmarks.harness import measure_benchmarks
from longred_megatron.evaluation.benchmarks.published import Benchmark
from longred_megatron.evaluation.benchmarks.results import by_ability
from longred_megatron.evaluation.by_length import scores_by_length
from longred_megatron.evaluation.corpus import Corpus
from longred_megatron.evaluation.effective_length import effective_lengths
from longred_megatron.evaluation.models import CausalModel
from longred_megatron.evaluation.perplexity import Losses, loss_by_position, measure_losses
from longred_megatron.evaluation.report import ModelReport
from longred_megatron.evaluation.similarity import LayerSimilarity, hidden_state_similarity, why_not_comparable
from longred_megatron.evaluation.subjects import Subject
from longred_megatron.evaluation.tasks.results import measure_task

# Each costs a forward pass of two models, and a mean over 16 windows of tokens is steady.
SIMILARITY_WINDOWS = 16


@dataclass(frozen=True)
class Measured:
    """A model, its report, and what of its measurements another model's are compared with."""

    model: CausalModel
    report: ModelReport
    short: Losses
    long: Losses


def measure_model(
    subject: Subject,
    model: CausalModel,
    corpus: Corpus,
    benchmarks: Sequence[Benchmark],
    tokens_per_batch: int,
    seed: int,
    reference: Measured | None,
) -> Measured:
    """Measures `subject`, loaded as `model`, and compares it with `reference`, None for the reference itself.

    What needs the same tokens is compared where the tokenizers agree.
    """
    notes = list(corpus.notes)
    similarity: LayerSimilarity | None = None
    if reference is not None:
        reason = why_not_comparable(model, reference.model)
        if reason is None:
            windows = corpus.short.tokens[:SIMILARITY_WINDOWS]
            similarity = hidden_state_similarity(model, reference.model, windows, tokens_per_batch)
        else:
            notes.append(reason)
    paired = reference
    if reference is not None and model.encoder.fingerprint != reference.model.encoder.fingerprint:
        paired = None
    short = measure_losses(model, corpus.short, tokens_per_batch, "short texts")
    long = measure_losses(model, corpus.long, tokens_per_batch, "long texts")
    answered = measure_benchmarks(model, benchmarks, tokens_per_batch)
    theirs = {result.task: result for result in paired.report.retrieval} if paired else {}
    retrieval = tuple(
        measure_task(model, task, prompts, tokens_per_batch, seed, theirs.get(task.name))
        for task, prompts in corpus.prompts.items()
    )
    report = ModelReport(
        name=model.name,
        path=str(model.facts.path),
        family=model.facts.family,
        run=subject.run,
        step=subject.step,
        is_reference=reference is None,
        max_position_embeddings=model.facts.max_position_embeddings,
        rope=model.facts.rope,
        num_parameters=model.num_parameters,
        short=loss_by_position(short, corpus.short, seed, paired.short if paired else None),
        long=loss_by_position(long, corpus.long, seed, paired.long if paired else None),
        retrieval=retrieval,
        effective_lengths=effective_lengths(scores_by_length(retrieval)),
        benchmarks=answered,
        abilities=by_ability(answered, reference.report.benchmarks) if reference else (),
        similarity=similarity,
        notes=tuple(notes),
    )
    return Measured(model, report, short, long)
