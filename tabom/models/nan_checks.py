"""Finds the cause of logits that are not finite: a weight, or an overflow of the dtype."""

from itertools import chain

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


def own_part(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter: a shard of FSDP2, a partition of DeepSpeed's ZeRO-3, or the whole."""
    if isinstance(parameter, DTensor):
        return parameter.detach().to_local()
    return getattr(parameter, "ds_tensor", parameter)


def logits_not_finite(model: PreTrainedModel) -> FloatingPointError:
    """The error for logits, or entropies of them, that are NaN or infinite; names the cause.

    Reads all of this rank's weights, which takes as long as a step. Needs no communication with other ranks.
    """
    for name, weight in chain(model.named_parameters(), model.named_buffers()):
        if not own_part(weight).isfinite().all():
            cause = f"its weight {name} is not finite; save or download the model again, or take an earlier checkpoint"
            break
    else:
        dtype = str(model.dtype).removeprefix("torch.")
        others = "float32" if model.dtype == torch.bfloat16 else "bfloat16 or float32"
        cause = f"all its weights are finite, so they overflow in dtype={dtype}; load it in {others}"
    return FloatingPointError(f"model={model.config.name_or_path}: its logits are not finite: {cause}")
