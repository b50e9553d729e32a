"""Data sets: recorded episodes, one file per format, found by file name."""
