"""The contracts of models, tasks, data sets and rewards."""
