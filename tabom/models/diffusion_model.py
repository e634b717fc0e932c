"""A model with its tokenizer and the conventions of its family: what everything above needs to know of a model."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from tabom.models.families import WHAT_LOADS

SAMPLED = 1024
"""Values of a tensor that a fingerprint looks at."""


@dataclass(frozen=True)
class DiffusionModel:
    """A model with bidirectional attention, its tokenizer, and the conventions of its family.

    `logits_shift` is how far to the left the logits of a token stand: 0 in LLaDA and masked language models, 1 in
    Dream, whose logits at i - 1 predict the token at i.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    mask_token_id: int
    pad_token_id: int
    eos_token_id: int | None
    logits_shift: int = 0

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return self.model.device

    @cached_property  # every request asks for it
    def first_position(self) -> int:
        """The id of a sequence's first position: RoBERTa and its kin count from behind the padding's."""
        tables = (getattr(module, "position_embeddings", None) for module in self.model.modules())
        paddings = (getattr(table, "padding_idx", None) for table in tables)
        return next((padding + 1 for padding in paddings if padding is not None), 0)

    @property
    def positions(self) -> int | None:
        """The longest sequence, tokens, that the model has positions for; None: the config says nothing."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        return None if positions is None else positions - self.first_position

    def fingerprint(self) -> str:
        """Of the weights and their dtype: names, shapes and `SAMPLED` evenly spaced values of every tensor.

        A model that was trained further under the same path gives another one; all of 8 billion weights would take
        longer to read than the first answers.
        """
        digest = hashlib.sha256()
        for name, weight in sorted(self.model.state_dict().items()):
            values = weight.detach().reshape(-1)
            chosen = torch.linspace(0, max(len(values) - 1, 0), min(len(values), SAMPLED)).long()
            sample = values[chosen.to(values.device)].cpu().contiguous()
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(sample.view(torch.uint8).numpy().tobytes())
        return f"{self.model.dtype}, sha256 {digest.hexdigest()[:16]}".removeprefix("torch.")


def describe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> DiffusionModel:
    """The conventions of a model in memory, read from its config and tokenizer.

    Raises:
        ValueError: the model attends causally, or no mask token is known, or it is not in the vocabulary.
    """
    config = model.config
    if type(model).__name__ == MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(config.model_type):
        config.is_causal = False  # which the config of a masked language model need not say
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
            "or the tokenizer's mask_token"
        )
    if not 0 <= mask_token_id < config.vocab_size:
        raise ValueError(f"mask_token_id={mask_token_id}: not in this model's vocabulary of {config.vocab_size}")
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    logits_shift = getattr(config, "logits_shift", 0)
    return DiffusionModel(model, tokenizer, mask_token_id, pad_token_id, tokenizer.eos_token_id, logits_shift)


def logits_at(
    model: PreTrainedModel, rows: Tensor, forward: Callable[..., Any] | None = None, **inputs: Tensor
) -> Tensor:
    """Runs the model and returns the logits of chosen positions only, (N, V).

    The rows are gathered just before the head, so the head never sees the others; the model's own forward does
    everything else, such as scaling or capping the logits. A model without such a head gives all logits.

    Args:
        rows: (N,) int64 indices into the flattened (B * L) positions of `inputs`.
        forward: called instead of `model`, for a caller that has replaced the model's forward.
        inputs: what the model's forward takes: `input_ids` (B, L), `attention_mask`, `position_ids`, ...

    Raises:
        ValueError: the model does not give logits of each position.
    """
    shape, is_chosen = inputs["input_ids"].shape, False

    def keep_rows(_head: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        nonlocal is_chosen
        (hidden,) = args
        if hidden.shape[:-1].numel() != shape.numel():
            return None  # as ProphetNet's, which predicts several tokens at a position
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
