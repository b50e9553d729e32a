"""A policy: a model with the sampler that acts, the parts saved with it, and its folder."""
