"""Prompts in, responses and the order of their unmasking out."""
