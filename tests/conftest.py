"""Settings that have to be in the environment before torch and transformers are imported."""

import os
import signal

# A shell starts what runs in its background without Ctrl-C, and so would be all processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Tests run side by side and start several ranks each: one thread a process, or they fight for the cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["LONGRED_DEVICE"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
