"""Putting a plan in force on a live model: rounding, scopes, FP8, attaching and removing."""
