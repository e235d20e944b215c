"""Transformer Engine's Userbuffers: a layer's products exchange tokens with the other tensor ranks piece by piece.

With sequence parallelism alone, a product waits until all tokens have come, and their sum until it is done.
"""

import torch

from longred_megatron.dtypes import DTYPES
from longred_megatron.layout import Parallel


def allocate(parallel: Parallel, params: str, tokens: int, hidden_size: int) -> None:
    """Takes the buffers of this process, which all layers share; nothing without `parallel.tp_comm_overlap`.

    All ranks call it, after those of a model before have been freed (`forget_models`).

    Args:
        params: the parameters' format.
        tokens: of a context rank's micro-batch, whole: each tensor rank holds a part of them.
    """
    if parallel.tp_comm_overlap:
        from transformer_engine.pytorch import UserBufferQuantizationMode, initialize_ub

        initialize_ub(
            [tokens, hidden_size],
            parallel.tensor,
            quantization_modes=[UserBufferQuantizationMode.NONE],
            dtype=DTYPES[params],
            bootstrap_backend=torch.distributed.get_backend(),
        )
