"""Rewards: one file per scorer, found by file name."""
