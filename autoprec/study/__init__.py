"""Searching: the space of assignments, the study on Optuna, the front and the verdict."""
