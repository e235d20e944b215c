"""Published benchmarks on short texts, run by EleutherAI's lm-evaluation-harness from data sets on disk."""
