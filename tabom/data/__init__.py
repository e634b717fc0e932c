"""Trajectories and prompts: what is read from and written to files, and its way to token ids."""
