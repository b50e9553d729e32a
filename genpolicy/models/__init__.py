"""Models: one file per family of networks, found by file name."""
