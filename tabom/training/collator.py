"""From trajectories to the batches that the model's forward takes."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from tabom.data.tokenized import TokenizedTrajectory, tokenize
from tabom.training.objectives import ObjectiveSettings, Target, make_target
from tabom.training.windows import example_rng
from tabom_kernels import count_ordered_pairs

IGNORE_INDEX = -100
DENOMINATORS = ("num_tokens", "num_sequences")

Example = tuple[list[int], list[int], Target]
"""Prompt token ids, response token ids, and what is asked of the response."""

FILLER = -1
"""Index of no record: fills the last batch of an epoch up, so that every process has as many batches."""


class TrajectoryDataset(Dataset):
    """Examples by (epoch, index), from a table that is mapped from a file.

    The epoch is part of the key, not a state of the dataset, so a worker that was started in another epoch, another
    rank or a resumed run draws the same cut.

    Args:
        source: see `tabom.data.tokenized.tokenize`, which takes the options as well.
    """

    def __init__(
        self,
        source: Any,
        tokenizer: PreTrainedTokenizerBase,
        settings: ObjectiveSettings,
        seed: int,
        **options: Any,
    ) -> None:
        self.table, _ = tokenize(source, tokenizer, **options)
        self.rows = self.table.select_columns([each.name for each in fields(TokenizedTrajectory)])
        self.settings = settings
        self.seed = seed

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: tuple[int, int]) -> Example | None:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[Example | None]:
        """Those of a batch, which the table gives up at once in a fraction of the time."""
        columns = self.rows[[index for _, index in keys if index != FILLER]]
        trajectories = map(TokenizedTrajectory, *(columns[each.name] for each in fields(TokenizedTrajectory)))
        return [None if index == FILLER else self.example(next(trajectories), epoch, index) for epoch, index in keys]

    def example(self, trajectory: TokenizedTrajectory, epoch: int, index: int) -> Example:
        """What is asked of that record in that epoch."""
        target = make_target(trajectory, self.settings, example_rng(self.seed, epoch, index))
        return trajectory.prompt_token_ids, trajectory.response_token_ids, target

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its response."""
        columns = self.table.select_columns(["prompt_token_ids", "response_token_ids"]).with_format("arrow")
        lengths = (pc.add(*map(pc.list_value_length, batch.columns)) for batch in columns.iter(batch_size=1000))
        return max((pc.max(each).as_py() for each in lengths), default=0)

    def asks_anything(self) -> bool:
        """Whether any record has a token to learn; drawn a few times, as a cut may fall between two steps."""
        keys = ((epoch, index) for epoch in range(8) for index in range(len(self)))
        return any(self[key][2].supervised.any() for key in keys)

    @cached_property
    def digest(self) -> str:
        """Of all that the examples are made from, and their order."""
        digest = hashlib.sha256(b"".join(self.table["digest"]))
        return f"{len(self)} trajectories, sha256 {digest.hexdigest()[:16]}"

    def count_origins(self) -> Counter[tuple[str | None, str | None]]:
        """How many trajectories there are of each data source and method."""
        return Counter(zip(self.table["data_source"], self.table["method"], strict=True))


class EpochSampler(Sampler):
    """Yields the keys (epoch, index) of a `TrajectoryDataset` in an order that depends on (seed, epoch) alone.

    Args:
        multiple_of: fill an epoch up to a multiple of so many keys with `FILLER`.
    """

    def __init__(self, length: int, seed: int, shuffle: bool, multiple_of: int = 1) -> None:
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        self.fillers = -length % multiple_of
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length + self.fillers

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.arange(self.length)
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        return ((self.epoch, int(index)) for index in (*order, *[FILLER] * self.fillers))


class TrajectoryCollator:
    """Pads and packs examples.

    A batch holds `input_ids` and `attention_mask` (B, L), right-padded, with masked response tokens; and, packed over
    the N positions that are supervised or ranked: `rows` (N,) flat indices of the logits in (B * L), `labels` (N,)
    with -100 = not supervised, `steps` (N,) with -1 = not ranked, `token_weights` (N,) and `cu_seqlens` (B + 1,).
    `lengths` are the rows of each sequence once more, which stay on the host when the batch goes to a GPU.
    `num_tokens` and `num_sequences` are this batch's shares of the denominators of cross-entropy and rank loss.
    A filler (None) is a row of one token that is asked nothing.
    """

    def __init__(self, mask_token_id: int, pad_token_id: int, logits_shift: int = 0) -> None:
        self.mask_token_id = mask_token_id
        self.pad_token_id = pad_token_id
        self.logits_shift = logits_shift

    def __call__(self, examples: Sequence[Example | None]) -> dict[str, Any]:
        examples = [example or ask_nothing() for example in examples]
        length = max(len(prompt) + len(response) for prompt, response, _ in examples)
        input_ids = np.full((len(examples), length), self.pad_token_id)
        attention_mask = np.zeros((len(examples), length), dtype=np.int64)
        packed: dict[str, list[np.ndarray]] = {"rows": [], "labels": [], "steps": [], "token_weights": []}

        for b, (prompt, response, target) in enumerate(examples):
            start, end = len(prompt), len(prompt) + len(response)
            input_ids[b, :start] = prompt
            input_ids[b, start:end] = np.where(target.masked, self.mask_token_id, response)
            attention_mask[b, :end] = 1

            needed = np.flatnonzero(target.supervised | (target.steps >= 0))
            packed["rows"].append(b * length + start + needed - self.logits_shift)
            packed["labels"].append(np.where(target.supervised, response, IGNORE_INDEX)[needed])
            packed["steps"].append(target.steps[needed])
            packed["token_weights"].append(target.token_weights[needed])

        lengths = [len(rows) for rows in packed["rows"]]
        batch = {name: torch.from_numpy(np.concatenate(arrays)) for name, arrays in packed.items()}
        batch["cu_seqlens"] = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            **batch,
            "lengths": lengths,
            "num_tokens": torch.tensor(sum(target.num_tokens for *_, target in examples)),
            "num_sequences": (count_ordered_pairs(batch["steps"], batch["cu_seqlens"]) > 0).sum(),
        }


def ask_nothing() -> Example:
    """One masked token without a label."""
    nowhere = np.zeros(1, dtype=bool)
    weights = np.ones(1, dtype=np.float32)
    return (
        [],
        [0],
        Target(masked=~nowhere, supervised=nowhere, steps=np.array([-1]), token_weights=weights, num_tokens=0),
    )
