"""Compiles the layers of a model with `torch.compile`, for a bounded number of shapes.

All layers have the same code and shapes, so one compilation serves them all. The last layer is not compiled, because a
decoding step computes only chosen rows of it, and neither is attention, whose shapes follow the lengths of the
sequences. The rest works row by row on packed rows, which are padded to one of four sizes per octave.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

SMALLEST_PADDED_ROWS = 64

COMPILED_SHAPES_LIMIT = 128
"""How many shapes may be compiled in a process, over all models and devices; 34 sizes reach up to 20 480 rows."""


def padded_rows(rows: int) -> int:
    """The next larger of 64, 80, 96, 112, 128, 160, ...: at most a quarter of padding, and four shapes per octave."""
    step = max(SMALLEST_PADDED_ROWS, 1 << (rows - 1).bit_length()) // 8
    return max(SMALLEST_PADDED_ROWS, -(-rows // step) * step)


class CompiledLayers:
    """Compiled versions of all layers but the last of a model of a native family; the model is not changed.

    Args:
        mode: mode of `torch.compile`; `reduce-overhead` captures CUDA graphs on a GPU.
    """

    def __init__(self, model: PreTrainedModel, mode: str) -> None:
        self.layers = model.get_decoder().layers[:-1]
        self.calls = [torch.compile(layer._call_impl, mode=mode, dynamic=False) for layer in self.layers]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within this context the model calls its compiled layers, as after `Module.compile`."""
        torch.compiler.cudagraph_mark_step_begin()
        for layer, call in zip(self.layers, self.calls, strict=True):
            layer._compiled_call_impl = call
        try:
            with torch._dynamo.config.patch(recompile_limit=COMPILED_SHAPES_LIMIT):
                yield
        finally:
            for layer in self.layers:
                layer._compiled_call_impl = None
