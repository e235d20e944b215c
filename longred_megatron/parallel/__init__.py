"""Process groups, context-parallel cuts, ranks of this machine, and Megatron on a CPU."""
