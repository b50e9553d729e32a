"""The comparisons of `benchmarks.speed`, one per file, and how they are timed."""
