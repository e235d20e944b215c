"""A run: micro-batches, steps, optimizer, metrics, and what keeps it alive."""
