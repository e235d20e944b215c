"""The method itself, in pure torch: positions, mixture, RoPE scaling, losses. Knows no Megatron."""
