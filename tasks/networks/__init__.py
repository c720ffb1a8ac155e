"""Builders of the networks in `tasks.models.MODELS`, one family to a file."""
