"""Pass-key retrieval among several keys, of which one is asked for."""

from longred_megatron.evaluation.tasks.base import Options
from longred_megatron.evaluation.tasks.passkey import Passkey


class MultiKey(Passkey):
    """`Options.num_keys` keys: the one asked for at the depth asked for, the others anywhere."""

    name = "multi-key"

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.num_keys = options.num_keys
        self.title = f"Multi-key ({self.num_keys} keys, one asked)"
