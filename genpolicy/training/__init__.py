"""One training run: its verbs, its processes, its folder."""
