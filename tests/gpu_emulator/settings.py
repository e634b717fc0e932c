"""How the emulator runs; the options of the pytest plugin set these."""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Settings:
    """Switches of the emulation, read when an instruction executes."""

    architecture: int = 90
    """The compute capability that kernels are compiled for: 80, 90 or 100."""

    perturb: bool = False
    """Approximate instructions (ex2, lg2, rcp, div.full, tanh) are off, within their documented bound."""

    chaos: bool = False
    """Warps run in a random order, one basic block at a time, instead of in the order of the program."""

    lanes_at_once: int = 4096
    """Threads that numpy executes together; a batch holds at least one CTA."""

    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    """Chooses the warps that run under `chaos`."""


SETTINGS = Settings()
