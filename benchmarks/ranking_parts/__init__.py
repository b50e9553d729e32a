"""The pieces of benchmarks/critic_ranking."""
