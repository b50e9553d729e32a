"""Measuring a policy: scores on fixed prompts and fixed starts, pictures, curves, comparisons."""
