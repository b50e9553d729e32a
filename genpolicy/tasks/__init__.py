"""Tasks: what is asked of a policy, one file each, found by file name."""
