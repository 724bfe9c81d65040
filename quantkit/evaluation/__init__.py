"""Evaluation: how far a model has drifted from its reference, on the same tokens and questions."""
