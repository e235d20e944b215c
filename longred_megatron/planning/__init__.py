"""What a run will take before it starts: memory, time and messages of every rank, from its recipe."""
