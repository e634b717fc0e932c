"""The default number of positions of a decoding step: as many as fit in memory, up to where more is no faster."""

import psutil
import torch
from transformers import PreTrainedConfig

from tabom.models.diffusion_model import DiffusionModel

CPU_POSITION_LIMIT = 2**12
"""Positions of a step on a CPU. Larger steps take the same time per position (the lab's model: 57 µs of a core at 3200
positions, 53 µs at 6400).
"""

GPU_POSITION_LIMIT = 2**14
"""Positions of a step on a GPU without a cache. A matmul of fewer than some 300 rows is bound by reading its weights in
bf16 (990 TFLOP/s over 3.35 TB/s on an H100's data sheet), one of more rows by its arithmetic: at 2**14 rows reading the
weights takes 2 % of the time of the arithmetic. More rows would hardly be faster per position, would take more memory,
and would delay the first responses. Derived from the data sheet, not yet measured.
"""


def default_budget(model: DiffusionModel, keeps: bool = False) -> int:
    """How many positions a step computes: as many as fit in half of the free memory, at most the limits above.

    The other half of the memory is left for the allocator's fragmentation. Dream-7B in bf16 takes 2 * (2 * 3584 + 3 *
    152064) bytes for a position, which is 0.93 MB, so that 60 GB of free memory hold 32 000 positions; a step gets
    `GPU_POSITION_LIMIT` of them, 40 sequences of 400. With a cache on a GPU only memory limits the positions, because a
    step computes only a block of each sequence.

    Args:
        keeps: whether a cache holds keys and values; see `bytes_per_position`.
    """
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
    else:
        free = psutil.virtual_memory().available
    fitting = max(1, free // 2 // bytes_per_position(model.model.config, model.model.dtype.itemsize, keeps))
    if model.device.type == "cuda":
        return fitting if keeps else min(fitting, GPU_POSITION_LIMIT)
    return min(fitting, CPU_POSITION_LIMIT)


def bytes_per_position(config: PreTrainedConfig, itemsize: int, keeps: bool) -> int:
    """The most bytes that a step holds for each position, which is the largest of attention, MLP and head.

    Attention holds 9 rows of the hidden size D (the residual stream, its norm, queries, keys, values, the rotated
    queries and keys, the output), the MLP 6 rows of D and 3 of the intermediate size (gate, its activation, up), and
    the head 2 rows of D and 3 of the vocabulary (the logits, filtered twice). A cache adds the keys and values of every
    layer.
    """
    hidden = config.hidden_size
    held = max(9 * hidden, 6 * hidden + 3 * config.intermediate_size, 2 * hidden + 3 * config.vocab_size)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    kept = 2 * config.num_hidden_layers * heads * head_size if keeps else 0
    return (held + kept) * itemsize
