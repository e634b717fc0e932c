"""The lab: a tiny diffusion language model and verifiable tasks, to try everything on a laptop."""
