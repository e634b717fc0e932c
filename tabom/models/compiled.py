"""Layers of a model compiled with `torch.compile`, for a bounded number of shapes.

Layers are alike, so that one of them is compiled for all; the last one, of which a decoding step computes chosen rows
only, is left as it is, and so is attention, whose shapes follow the lengths of the sequences. What remains works row by
row: it takes packed rows padded to the next of four sizes an octave.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

FEWEST_ROWS = 64

MOST_SHAPES = 128
"""That may be compiled, models and devices of one process together; 34 sizes reach up to 20 480 rows."""


def padded_rows(rows: int) -> int:
    """The next of 64, 80, 96, 112, 128, 160, ...: at most a quarter more, and four compilations an octave."""
    step = max(FEWEST_ROWS, 1 << (rows - 1).bit_length()) // 8
    return max(FEWEST_ROWS, -(-rows // step) * step)


class CompiledLayers:
    """All layers of a model of a native family but the last, compiled; the model itself stays as it is.

    Args:
        mode: of `torch.compile`; `reduce-overhead` captures CUDA graphs on a GPU.
    """

    def __init__(self, model: PreTrainedModel, mode: str) -> None:
        self.layers = model.get_decoder().layers[:-1]
        self.calls = [torch.compile(layer._call_impl, mode=mode, dynamic=False) for layer in self.layers]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The layers are called compiled, as `Module.compile` would have it for good."""
        torch.compiler.cudagraph_mark_step_begin()
        for layer, call in zip(self.layers, self.calls, strict=True):
            layer._compiled_call_impl = call
        try:
            with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES):
                yield
        finally:
            for layer in self.layers:
                layer._compiled_call_impl = None
