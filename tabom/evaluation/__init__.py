"""Measures responses: whether they are right, and whether the model was most certain of what it unmasked first."""
