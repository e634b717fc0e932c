"""Trajectories and prompts: reading and writing them, and encoding them as token ids."""
