"""Rounds: decode with the current weights, judge, train on the responses, and again."""
