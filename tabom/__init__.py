"""TABOM post-training of diffusion language models.

Data flows one way: prompts -> `sampler` -> `trajectories` -> `windows` -> `collator` -> `forward` (model and
loss) -> `trainer` -> checkpoint. The loss itself is in `tabom_kernels`.
"""

__version__ = "0.1.0"
