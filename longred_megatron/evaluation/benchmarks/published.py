"""Which benchmarks there are, and how each is asked and scored.

The eight that LongReD (arXiv 2502.07365) names of its 17; the others could not be found, nor which belongs to which of
its five abilities, nor the number of examples in a prompt. The abilities here are our grouping. A benchmark is asked
as the harness does by default, but for MMLU with the five examples of its paper (arXiv 2009.03300).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """A task of the harness.

    task: its name there; folder: of its files, below the harness's `tasks`, or a path; metric: its name and its
    filter's, None for the first that the task has; dataset: on the Hugging Face Hub; num_examples: solved ones in
    the prompt, None for the task's own number; best: the metric of a perfect model; runs_code: that the model writes.
    """

    name: str
    ability: str
    task: str
    folder: str
    metric: str | None
    dataset: str | None
    num_examples: int | None = None
    best: float = 1.0
    runs_code: bool = False


_ALL = (
    Benchmark("mmlu", "general", "mmlu", "mmlu/default", "acc,none", "cais/mmlu", num_examples=5),
    Benchmark("bbh", "general", "bbh_cot_fewshot", "bbh/cot_fewshot", "exact_match,get-answer", "SaylorTwift/bbh"),
    Benchmark("lambada", "language", "lambada_openai", "lambada", "acc,none", "EleutherAI/lambada_openai"),
    Benchmark("piqa", "language", "piqa", "piqa", "acc,none", "baber/piqa"),
    Benchmark("squadv2", "reading", "squadv2", "squadv2", "f1,none", "lighteval/squad_v2", best=100.0),
    Benchmark("drop", "reading", "drop", "drop", "f1,none", "EleutherAI/drop"),
    Benchmark(
        "triviaqa", "knowledge", "triviaqa", "triviaqa", "exact_match,remove_whitespace", "mandarjoshi/trivia_qa"
    ),
    Benchmark(
        "humaneval", "code", "humaneval", "humaneval", "pass@1,create_test", "openai/openai_humaneval", runs_code=True
    ),
)
PUBLISHED = {benchmark.name: benchmark for benchmark in _ALL}
# The ability of tasks from the user's own files.
OWN_ABILITY = "own tasks"
