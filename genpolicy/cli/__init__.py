"""The door: one verb per file."""
