"""TABOM post-training of diffusion language models.

Data flows one way, a room a stage: prompts -> `sampling` -> trajectories (`data`) -> `training` (windows, collator,
forward, loss) -> checkpoint -> `evaluation`. What people use comes from here; nothing is imported before it is asked
for. The loss itself is in `tabom_kernels`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tabom.data.histories import DiffusersRecorder, from_histories, from_step_map
    from tabom.data.prompts import PromptSet, read_prompts
    from tabom.data.trajectories import Trajectory, read_trajectories
    from tabom.data.verifiers import Verdict, make_verifier
    from tabom.models.diffusion_model import DiffusionModel, describe
    from tabom.models.loading import load
    from tabom.models.merging import merge_adapter
    from tabom.sampling.collect import collect
    from tabom.sampling.completions import Completion, decode_response
    from tabom.sampling.config import CollectConfig, EngineConfig, SamplerConfig
    from tabom.sampling.engine import Engine, Request, sample
    from tabom.sampling.sampler import denoise
    from tabom.training.config import TabomConfig
    from tabom.training.patch import patch, unpatch
    from tabom.training.trainer import TabomTrainer

__version__ = "0.1.0"

__all__ = [
    "CollectConfig",
    "Completion",
    "DiffusersRecorder",
    "DiffusionModel",
    "Engine",
    "EngineConfig",
    "PromptSet",
    "Request",
    "SamplerConfig",
    "TabomConfig",
    "TabomTrainer",
    "Trajectory",
    "Verdict",
    "collect",
    "decode_response",
    "denoise",
    "describe",
    "from_histories",
    "from_step_map",
    "load",
    "make_verifier",
    "merge_adapter",
    "patch",
    "read_prompts",
    "read_trajectories",
    "sample",
    "unpatch",
]

MODULES = {
    "data.histories": ("DiffusersRecorder", "from_histories", "from_step_map"),
    "data.prompts": ("PromptSet", "read_prompts"),
    "data.trajectories": ("Trajectory", "read_trajectories"),
    "data.verifiers": ("Verdict", "make_verifier"),
    "models.diffusion_model": ("DiffusionModel", "describe"),
    "models.loading": ("load",),
    "models.merging": ("merge_adapter",),
    "sampling.collect": ("collect",),
    "sampling.completions": ("Completion", "decode_response"),
    "sampling.config": ("CollectConfig", "EngineConfig", "SamplerConfig"),
    "sampling.engine": ("Engine", "Request", "sample"),
    "sampling.sampler": ("denoise",),
    "training.config": ("TabomConfig",),
    "training.patch": ("patch", "unpatch"),
    "training.trainer": ("TabomTrainer",),
}
"""Where the names are, for `__getattr__`; what type checkers read above says the same."""


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first asked for (PEP 562)."""
    for module, names in MODULES.items():
        if name in names:
            return getattr(import_module(f"tabom.{module}"), name)
    raise AttributeError(f"module 'tabom' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, also those not yet imported."""
    return [*globals(), *__all__]
