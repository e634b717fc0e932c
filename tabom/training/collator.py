"""Makes the batches that the model's forward takes, from examples."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tabom.models.diffusion_model import LogitRows
from tabom.models.layout import Layout, lay_out
from tabom.training.objectives import Example, Target, empty_example
from tabom.training.settings import FirstTokenLogits
from tabom_kernels import count_ordered_pairs

IGNORE_INDEX = -100
DENOMINATORS = ("num_tokens", "num_sequences")


class TrajectoryCollator:
    """Pads and packs examples.

    A batch holds `input_ids` and `attention_mask` (B, L), right-padded, with masked response tokens; and, packed over
    the N positions that are supervised or ranked: `rows` (N,) flat indices of the logits in (B * L), `labels` (N,)
    with -100 = not supervised, `steps` (N,) with -1 = not ranked, `token_weights` (N,) and `cu_seqlens` (B + 1,).
    `lengths` are the numbers of rows of the sequences as Python integers, which stay on the host.
    `num_tokens` and `num_sequences` are this batch's shares of the denominators of cross-entropy and rank loss.
    A filler (None) becomes a sequence of one token without loss.

    With a `block_size` a record is laid out as in `tabom.models.layout`: the batch also holds `position_ids` and
    `is_noisy` (B, L), the sequences of `cu_seqlens` are the blocks, and `sequence_weights` scales the rank loss of each
    such that a record counts once, however many of its blocks have a pair.

    With a `temperature` the batch is one of the objective `policy`: it also holds `advantages` and, unless
    `has_ratios` is False, `old_logprobs` (N,), the `sampling_temperature`, and the `mask_token_id`, which is never
    sampled.

    Args:
        logit_rows: maps the rows of tokens to those of their logits; `DiffusionModel.logit_rows`.
        block_size: the model's.
        first_token_logits: where the shifted logits of the first token of a block stand, see `lay_out`.
        temperature: at which the responses were sampled.
    """

    def __init__(
        self,
        mask_token_id: int,
        pad_token_id: int,
        logit_rows: LogitRows,
        block_size: int | None = None,
        first_token_logits: FirstTokenLogits = "clean",
        temperature: float | None = None,
        has_ratios: bool = True,
    ) -> None:
        self.mask_token_id = mask_token_id
        self.pad_token_id = pad_token_id
        self.logit_rows = logit_rows
        self.block_size = block_size
        self.first_token_logits = first_token_logits
        self.temperature, self.has_ratios = temperature, has_ratios

    def __call__(self, examples: Sequence[Example | None]) -> dict[str, Any]:
        examples = [example or empty_example() for example in examples]
        layouts = [self.lay_out(each.prompt, each.response, each.target) for each in examples]
        length = max(len(layout.inputs["input_ids"]) for layout in layouts)
        packed: dict[str, list[np.ndarray]] = defaultdict(list)
        lengths: list[int] = []
        records: list[int] = []  # of the sequences of the rank loss

        for b, (example, layout) in enumerate(zip(examples, layouts, strict=True)):
            target = example.target
            needed = np.flatnonzero(target.supervised | (target.steps >= 0))
            packed["rows"].append(b * length + layout.logit_rows[needed])
            packed["labels"].append(np.where(target.supervised, example.response, IGNORE_INDEX)[needed])
            packed["steps"].append(target.steps[needed])
            packed["token_weights"].append(target.token_weights[needed])
            if self.temperature is not None:
                packed["advantages"].append(np.full(len(needed), example.advantage, dtype=np.float32))
                if self.has_ratios:
                    packed["old_logprobs"].append(np.array(example.logprob, dtype=np.float32)[needed])
            sequences = layout.blocks.max(initial=0) + 1
            lengths += np.bincount(layout.blocks[needed], minlength=sequences).tolist()
            records += [b] * sequences

        batch = {name: torch.from_numpy(np.concatenate(arrays)) for name, arrays in packed.items()}
        batch["cu_seqlens"] = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        has_pair = count_ordered_pairs(batch["steps"], batch["cu_seqlens"]).numpy() > 0
        sequences_with_pairs = np.bincount(np.array(records)[has_pair], minlength=len(examples))
        if self.block_size is not None:
            weights = 1 / np.maximum(sequences_with_pairs, 1, dtype=np.float32)
            batch["sequence_weights"] = torch.from_numpy(weights[records])
        if self.temperature is not None:
            batch |= {"sampling_temperature": self.temperature, "mask_token_id": self.mask_token_id}
        return {
            **self.pad([layout.inputs for layout in layouts], length),
            **batch,
            "lengths": lengths,
            "num_tokens": torch.tensor(sum(example.target.num_tokens for example in examples)),
            "num_sequences": torch.tensor(np.count_nonzero(sequences_with_pairs)),
        }

    def lay_out(self, prompt: list[int], response: list[int], target: Target) -> Layout:
        """The layout of an example, with its masks."""
        layout = lay_out(
            prompt, response, self.mask_token_id, self.logit_rows, self.block_size, self.first_token_logits
        )
        layout.inputs["input_ids"][layout.token_rows[target.masked]] = self.mask_token_id
        return layout

    def pad(self, records: Sequence[dict[str, np.ndarray]], length: int) -> dict[str, Tensor]:
        """(B, L) of each input, padded on the right: token ids with the padding token, all others with 0."""
        padded = {}
        for name, first in records[0].items():
            padding = self.pad_token_id if name == "input_ids" else 0
            array = np.full((len(records), length), padding, dtype=first.dtype)
            for row, record in zip(array, records, strict=True):
                row[: len(record[name])] = record[name]
            padded[name] = torch.from_numpy(array)
        return padded
