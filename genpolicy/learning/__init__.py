"""The pure pieces of reinforcement learning: advantages and objectives."""
