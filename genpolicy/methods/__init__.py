"""Methods: one paper, one file that reads like its pseudo-code, found by file name."""
