"""The keys of a teacher cache: equal where a teacher says the same, whatever the run.

A key is a hash of the teacher, of one sequence as the teacher sees it, and of the place whose values are kept.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from longred_megatron.checkpoint.weight_files import WeightFiles
from longred_megatron.families import Architecture
from longred_megatron.objectives.base import HeadEntries, Tap
from longred_megatron.precision import Precision
from longred_megatron.rope.frequencies import RotaryFrequencies

VERSION = 2  # of the files and keys; another one's are not found
SAMPLED_ROWS = 16  # of each weight: a model that was trained on differs in all of them


class TeacherKeys:
    """The keys of one teacher's values.

    Of its weights some rows are looked at, so that a start does not read them all.

    number_format: in which values are kept.
    """

    def __init__(self, hf: Path, architecture: Architecture, precision: Precision, number_format: str) -> None:
        self._identity = hashlib.sha256(
            json.dumps([VERSION, repr(architecture), precision.model_dump(mode="json"), number_format]).encode()
        )
        with WeightFiles(hf) as files:
            for name, shape in sorted(files.shapes().items()):
                self._identity.update(json.dumps([name, shape]).encode())
                for row in range(0, shape[0], max(1, shape[0] // SAMPLED_ROWS)):
                    self._identity.update(files[name][row : row + 1].float().numpy().tobytes())
        self._frequencies = RotaryFrequencies(
            architecture.rope, architecture.head_dim, architecture.max_position_embeddings, "cpu"
        )

    def of(
        self,
        tokens: Tensor,
        positions: Tensor,
        documents: Sequence[Sequence[int]] | None,
        length: int,
        places: Sequence[Tap],
        few: HeadEntries | None,
    ) -> list[dict[Tap, str]]:
        """For each sequence of a micro-batch, the key of each place.

        Args:
            tokens, positions: [sequences, sequence_length], whole.
            documents: the lengths of each sequence's, where they do not see each other.
            length: largest position + 1 of the micro-batch, which some RoPE depend on.
            few: which entries, where these are kept.
        """
        model = self._identity.copy()
        model.update(self._frequencies(length).numpy().tobytes())
        keys = []
        for number, (row, row_positions) in enumerate(zip(tokens, positions, strict=True)):
            text = model.copy()
            for each in (row, row_positions):
                text.update(each.numpy().tobytes())
            text.update(json.dumps(documents and list(documents[number])).encode())
            keys.append({place: _finished(text, place, few) for place in places})
        return keys


def _finished(text: "hashlib._Hash", place: Tap, few: HeadEntries | None) -> str:
    own = text.copy()
    own.update(json.dumps([place, few if few and place == few.tap else None]).encode())
    return own.hexdigest()
