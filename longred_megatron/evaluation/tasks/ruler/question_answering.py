"""RULER's question answering: a question on one document (`qa_1`) or on several (`qa_2`), among other documents.

RULER takes SQuAD for the first and HotpotQA for the second; here the questions are those of the user's file.
"""

import random
from collections.abc import Callable, Sequence

from longred_megatron.errors import UserError
from longred_megatron.evaluation.tasks.base import Options, Place, Prompt
from longred_megatron.evaluation.tasks.ruler.base import RulerTask, string_match_part
from longred_megatron.evaluation.tasks.ruler.question_file import Question, read_questions
from longred_megatron.evaluation.tasks.written import Written

ASKED = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
INSTRUCTION = f"{ASKED}\n\nThe following are given documents.\n\n{{context}}\n\n{ASKED}\n\nQuestion: {{question}}"
PREFIX = " Answer:"


class QuestionAnswering(RulerTask):
    """The documents of a question among documents of the others. A unit is one document of another question.
    Expected are all answers that are right, of which one is enough."""

    score_meaning = "share of questions to which the output names a right answer"
    rule = "1 if the output contains any of `expected`, whatever its case, else 0"
    num_new_tokens = 32
    least_units = 0
    several_documents: bool

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.questions: list[Question] = []
        self.documents: list[str] = []

    @classmethod
    def missing(cls, options: Options) -> str | None:
        return None if options.questions else "needs questions: give --questions FILE.jsonl"

    def problems(self) -> list[str]:
        """Reads the file."""
        if why := self.missing(self.options):
            return [f"--tasks {self.name}: {why}"]
        assert self.options.questions is not None
        try:
            found = read_questions(self.options.questions)
        except UserError as error:
            return list(error.problems)
        of_kind = [each for each in found if (len(each.documents) > 1) == self.several_documents]
        self.documents = list(dict.fromkeys(document for each in of_kind for document in each.documents))
        self.questions = [each for each in of_kind if set(each.documents) != set(self.documents)]
        if not self.questions:
            what = "several documents" if self.several_documents else "one document"
            return [
                f"--questions {self.options.questions}: has not two questions on {what} each, which {self.name} needs "
                "(one to ask, the other's documents beside it); add some or leave out the task"
            ]
        return []

    def facts(self) -> dict[str, int | str]:
        return {"num_questions": len(self.questions), "num_documents": len(self.documents)}

    def room_needed(self) -> str:
        return "the documents of every question drawn"

    def writer(self, place: Place) -> Callable[[int], Written]:
        question = place.rng.choice(self.questions)
        others = [document for document in self.documents if document not in question.documents]
        place.rng.shuffle(others)
        seed = place.rng.getrandbits(64)
        return lambda num_units: _write(question, others, num_units, random.Random(seed))

    def score(self, prompt: Prompt, text: str) -> float:
        return string_match_part(text, prompt.expected)


def _write(question: Question, others: Sequence[str], num_others: int, rng: random.Random) -> Written:
    """Where all other documents are not enough they come again, as in RULER."""
    documents = [*question.documents, *(others[index % len(others)] for index in range(num_others))]
    rng.shuffle(documents)
    context = "\n\n".join(f"Document {number}:\n{document}" for number, document in enumerate(documents, start=1))
    return Written(INSTRUCTION.format(context=context, question=question.question), PREFIX, question.answers)


class Qa1(QuestionAnswering):
    """Questions on one document, as SQuAD's."""

    name = "qa_1"
    title = "Questions, 1 document"
    several_documents = False


class Qa2(QuestionAnswering):
    """Questions on several documents, as HotpotQA's."""

    name = "qa_2"
    title = "Questions, several documents"
    several_documents = True
