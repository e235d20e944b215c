"""Settings that have to be in the environment before torch and transformers are imported."""

import os

# Tests run side by side and start several ranks each: one thread a process, or they fight for the cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["LONGRED_DEVICE"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
