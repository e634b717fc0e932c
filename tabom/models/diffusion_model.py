"""A model with its tokenizer and the conventions of its family, which all stages of the pipeline use."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from tabom.models.attention import as_bias, block_causal_mask, check_flex_device
from tabom.models.families import BLOCK_CAUSAL, WHAT_LOADS

FINGERPRINT_VALUES = 1024
"""How many values of each tensor a fingerprint reads."""


Rows = TypeVar("Rows", int, Tensor, np.ndarray)
"""Row indices."""


@dataclass(frozen=True)
class LogitRows:
    """Maps the rows of tokens to the rows of the logits that predict them, which stand `shift` rows before.

    Rows index the positions of one sequence, flattened (B * L) positions, or packed sequences.
    """

    shift: int = 0

    def __call__(self, token_rows: Rows) -> Rows:
        """The rows of the logits that predict the tokens at `token_rows`, in the same shape."""
        return token_rows - self.shift


@dataclass(frozen=True)
class DiffusionModel:
    """A model with bidirectional attention, its tokenizer, and the conventions of its family.

    `logits_shift` is how far to the left the logits of a token stand: 0 in LLaDA and masked language models, 1 in
    Dream, whose logits at i - 1 predict the token at i. `block_size` is that of block-causal attention, in which a
    position attends to its whole block and to the blocks before it; with None every position attends to all.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    mask_token_id: int
    pad_token_id: int
    eos_token_id: int | None
    logits_shift: int = 0
    block_size: int | None = None

    @property
    def logit_rows(self) -> LogitRows:
        """Maps the rows of tokens to the rows of the logits that predict them."""
        return LogitRows(self.logits_shift)

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return self.model.device

    @cached_property  # read for every request
    def first_position(self) -> int:
        """The position id of the first token: 0, but models like RoBERTa count from after the id of the padding."""
        tables = (getattr(module, "position_embeddings", None) for module in self.model.modules())
        paddings = (getattr(table, "padding_idx", None) for table in tables)
        return next((padding + 1 for padding in paddings if padding is not None), 0)

    @property
    def positions(self) -> int | None:
        """The longest sequence, in tokens, that the model has positions for; None if the config has no limit."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        return None if positions is None else positions - self.first_position

    def inputs(self, input_ids: Tensor, is_token: Tensor | None = None) -> dict[str, Tensor]:
        """The arguments of the model's forward for sequences of token ids (B, L), with the model's attention.

        Args:
            is_token: (B, L) bool, False for the padding, which no token attends to; default: there is none.

        Raises:
            ValueError: the model has flex attention and is on a CPU.
        """
        check_flex_device(self.model.config, self.device)
        inputs = {"input_ids": input_ids}
        is_token = torch.ones_like(input_ids, dtype=torch.bool) if is_token is None else is_token
        positions = (is_token.cumsum(1) - 1).clamp(min=0)
        if not is_token.all():  # by default most models count padding as positions
            inputs["position_ids"] = self.first_position + positions
        if self.block_size is None:
            inputs["attention_mask"] = is_token.long()
        else:
            mask = block_causal_mask(positions, positions, self.block_size) & is_token[:, None, :]
            inputs["attention_mask"] = as_bias(mask[:, None], self.model.dtype)
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def fingerprint(self) -> str:
        """A text that identifies the weights and their dtype, so that models under the same path are told apart.

        It is a hash of the names, shapes and `FINGERPRINT_VALUES` evenly spaced values of all tensors. Hashing all of 8
        billion weights would take longer than decoding the first responses.

        Raises:
            ValueError: a weight is on the meta device, so it has no values here.
        """
        digest = hashlib.sha256()
        for name, weight in sorted(saved_tensors(self.model)):
            if weight.is_meta:
                raise ValueError(
                    f"weight {name} is on the meta device, where device_map leaves what it offloads: its values cannot "
                    "be read; load the whole model onto one device"
                )
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(sample_values(weight, FINGERPRINT_VALUES).view(torch.uint8).numpy().tobytes())
        return f"{self.model.dtype}, sha256 {digest.hexdigest()[:16]}".removeprefix("torch.")


def saved_tensors(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The items of the model's state_dict. Making one would shard the weights that FSDP2 has put together."""
    yield from model.named_parameters(remove_duplicate=False)
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def sample_values(tensor: Tensor, most: int) -> Tensor:
    """Evenly spaced values of a tensor, the first and the last among them: (min(most, numel),), on the CPU.

    Only these values are read, for any strides: a `reshape` would copy a tensor that is not contiguous. The indices are
    computed as integers, because fp32 holds no odd number beyond 2^24, and a head has 5 * 10^8 elements.
    """
    count = min(tensor.numel(), most)
    places = torch.arange(count) * (tensor.numel() - 1) // max(count - 1, 1)
    return tensor.detach()[torch.unravel_index(places.to(tensor.device), tensor.shape)].reshape(count).cpu()


def describe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> DiffusionModel:
    """The conventions of a model in memory, read from its config and tokenizer.

    Raises:
        ValueError: the model attends causally, or no mask token is known, or it is not in the vocabulary, or its config
            has another `logits_shift` than 0 or 1, or a block size and its model type cannot attend block-causally.
    """
    config = model.config
    block_size = getattr(config, "block_size", None)
    if block_size is not None:
        check_block_size(block_size, config.model_type)
        config.is_causal = False  # the mask of the blocks replaces the causal one
    if type(model).__name__ == MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(config.model_type):
        config.is_causal = False  # configs of masked language models often do not set it
    if getattr(config, "is_causal", True):
        raise ValueError(
            f"model type {config.model_type!r} attends causally; a diffusion language model needs bidirectional "
            f"attention. {WHAT_LOADS}"
        )
    mask_token_id = getattr(config, "mask_token_id", None)
    if mask_token_id is None:
        mask_token_id = tokenizer.mask_token_id
    if mask_token_id is None:
        raise ValueError(
            f"no mask token is known for this vocabulary of {config.vocab_size}: set mask_token_id in its config.json, "
            "give it to load (--mask_token_id), or set the tokenizer's mask_token"
        )
    if type(mask_token_id) is not int or not 0 <= mask_token_id < config.vocab_size:
        raise ValueError(f"mask_token_id={mask_token_id!r}: not in this model's vocabulary of {config.vocab_size}")
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    logits_shift = getattr(config, "logits_shift", 0)
    if logits_shift not in (0, 1):
        raise ValueError(f"logits_shift={logits_shift!r} in config.json: expected 0, or 1 as in Dream")
    return DiffusionModel(
        model, tokenizer, mask_token_id, pad_token_id, tokenizer.eos_token_id, logits_shift, block_size
    )


def check_block_size(block_size: int, model_type: str) -> None:
    """Raises a ValueError for a block size that is no positive number, or of a model that has no blocks."""
    if type(block_size) is not int or block_size < 1:
        raise ValueError(f"block_size={block_size!r}: expected a number of tokens of at least 1")
    if model_type not in BLOCK_CAUSAL:
        raise ValueError(
            f"block_size={block_size} with model type {model_type!r}: only {', '.join(BLOCK_CAUSAL)} attend "
            "block-causally; take block_size out of its config.json"
        )


def logits_at(
    model: PreTrainedModel, rows: Tensor, forward: Callable[..., Any] | None = None, **inputs: Tensor
) -> Tensor:
    """Runs the model and returns the logits of chosen positions only, (N, V).

    The rows are gathered just before the head, so that it computes no others. The model's own forward does everything
    else, such as scaling or capping the logits. If the model has no such head, all logits are computed and then
    gathered.

    Args:
        rows: (N,) int64 indices into the flattened (B * L) positions of `inputs`.
        forward: called instead of `model`, if the caller has replaced the model's forward.
        inputs: arguments of the model's forward: `input_ids` (B, L), `attention_mask`, `position_ids`, ...

    Raises:
        ValueError: the model does not give logits of each position.
    """
    shape, is_chosen = inputs["input_ids"].shape, False

    def keep_rows(_head: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        nonlocal is_chosen
        (hidden,) = args
        if hidden.shape[:-1].numel() != shape.numel():
            return None  # ProphetNet predicts several tokens at each position
        is_chosen = True
        return (hidden.reshape(-1, hidden.shape[-1])[rows],)

    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(keep_rows) if head is not None else None
    try:
        logits = (forward or model)(**inputs).logits
    finally:
        if hook is not None:
            hook.remove()
    if is_chosen:
        return logits
    if logits.shape[:-1] != shape:
        raise ValueError(f"logits: expected those of {tuple(shape)} positions, got {tuple(logits.shape)}")
    return logits.flatten(0, 1)[rows]
