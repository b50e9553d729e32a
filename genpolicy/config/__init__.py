"""The cellar: errors, the schema of an experiment, its parsing, and the leaves that it names."""
