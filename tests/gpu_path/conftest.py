"""These tests need processes of their own, where Transformer Engine is imported before Megatron is.

`tests/test_gpu_path.py` starts them. By hand: `LONGRED_TE=stub .venv/bin/python -m pytest tests/gpu_path -n0`.
"""

import os

if "LONGRED_TE" not in os.environ:
    collect_ignore_glob = ["*"]
