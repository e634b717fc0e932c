"""How much memory an op takes at most, without a profiler."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LargestMemory(TorchDispatchMode):
    """Records the most bytes that the result of any op has; those of an expanded tensor are its one value."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result
