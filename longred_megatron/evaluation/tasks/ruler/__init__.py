"""RULER's 13 tasks (arXiv 2404.06654), made from a seed and the user's own texts."""

from longred_megatron.evaluation.tasks.base import Task
from longred_megatron.evaluation.tasks.ruler.common_words import CommonWords
from longred_megatron.evaluation.tasks.ruler.frequent_words import FrequentWords
from longred_megatron.evaluation.tasks.ruler.needles import NEEDLE_TASKS
from longred_megatron.evaluation.tasks.ruler.question_answering import Qa1, Qa2
from longred_megatron.evaluation.tasks.ruler.variable_tracking import VariableTracking

RULER_TASKS: tuple[type[Task], ...] = (*NEEDLE_TASKS, VariableTracking, CommonWords, FrequentWords, Qa1, Qa2)
