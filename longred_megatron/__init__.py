"""Longer context windows for open language models, without making them worse on short texts."""

import sys


def _quiet_at_ctrl_c(kind: type[BaseException], *details: object) -> None:
    if kind is not KeyboardInterrupt:  # before `run_cli` has begun: while a command's first imports run
        sys.__excepthook__(kind, *details)  # type: ignore[arg-type]


sys.excepthook = _quiet_at_ctrl_c

import logging  # noqa: E402
import warnings  # noqa: E402

from longred_megatron.device import BeforeMegatron  # noqa: E402

sys.meta_path.insert(0, BeforeMegatron())

__version__ = "0.1.0"

# What Megatron and torch say of themselves when they are imported, of what is not installed on a CPU and what is
# deprecated. Here, since it has to be said before their first import, by every command and every rank.
warnings.filterwarnings("ignore", module=r"(megatron|torch\.distributed)\..*")
for _library in ("megatron", "torch.utils.cpp_extension"):
    logging.getLogger(_library).setLevel(logging.ERROR)
