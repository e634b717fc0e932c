"""The data sets of the trainer, made from what users pass to it: a table of examples, or a stream of them."""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from tabom.data.encoding import check_prompt
from tabom.data.tokenized import Tokenization, TokenizedTrajectory, tokenize
from tabom.models.diffusion_model import DiffusionModel
from tabom.training.advantages import group_advantages, sampling_temperature, with_rewards
from tabom.training.config import TabomConfig
from tabom.training.objectives import Example, ObjectiveSettings, make_examples
from tabom.training.settings import has_ratios
from tabom.training.stream import TrajectoryStream

logger = logging.getLogger(__name__)

FILLER = -1
"""Index that stands for no record. It fills the last batch of an epoch, so that all processes have as many batches."""


class TrajectoryDataset(Dataset):
    """Examples by (epoch, index), from a table that is mapped from a file.

    The epoch is part of the key and not a state of the data set, so that every worker, every rank and a resumed run
    draw the same cut.

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
        self.temperature: float | None = None
        if settings.objective == "policy" and len(self.table):
            self.table = with_rewards(self.table)
            needs_logprobs = has_ratios(settings.supervised_window, settings.window_unit)
            self.temperature = sampling_temperature(self.table, needs_logprobs)
            rewards, groups = np.array(self.table["reward"]), np.array(self.table["group"])
            self.advantages = group_advantages(rewards, groups, settings.scale_rewards)
        self.rows = self.table.select_columns([each.name for each in fields(TokenizedTrajectory)])
        self.settings = settings
        self.seed = seed

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: tuple[int, int]) -> Example | None:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[Example | None]:
        """The examples of a batch: of each record as many as it has targets.

        Reading them from the table at once is several times faster than one by one.
        """
        columns = self.rows[[index for _, index in keys if index != FILLER]]
        trajectories = map(TokenizedTrajectory, *(columns[each.name] for each in fields(TokenizedTrajectory)))
        examples: list[Example | None] = []
        for epoch, index in keys:
            if index == FILLER:
                examples.append(None)
            else:
                advantage = float(self.advantages[index]) if self.settings.objective == "policy" else 0.0
                examples += make_examples(next(trajectories), self.settings, self.seed, epoch, index, advantage)
        return examples

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its response."""
        lengths = (pc.add(*each) for each in self.lengths("prompt_token_ids", "response_token_ids"))
        return max((pc.max(each).as_py() for each in lengths), default=0)

    @property
    def shortest_prompt(self) -> int:
        """Tokens of the shortest prompt."""
        return min(pc.min(each).as_py() for (each,) in self.lengths("prompt_token_ids"))

    def lengths(self, *columns: str) -> Iterator[list[pa.Array]]:
        """The lengths of the lists in these columns, a batch of records at a time."""
        table = self.table.select_columns(list(columns)).with_format("arrow")
        for batch in table.iter(batch_size=1000):
            yield [pc.list_value_length(batch[column]) for column in columns]

    def has_targets(self) -> bool:
        """Whether any record has a token to learn. Draws several epochs, because a cut may fall between two steps."""
        keys = ((epoch, index) for epoch in range(8) for index in range(len(self)))
        return any(target.supervised.any() for key in keys for _, _, target, *_ in self.__getitems__([key]))

    @cached_property
    def digest(self) -> str:
        """The number of records and a hash of their contents in order."""
        digest = hashlib.sha256(b"".join(self.table["digest"]))
        return f"{len(self)} trajectories, sha256 {digest.hexdigest()[:16]}"

    def count_origins(self) -> Counter[tuple[str | None, str | None]]:
        """The number of trajectories of each data source and method."""
        return Counter(zip(self.table["data_source"], self.table["method"], strict=True))


class EpochSampler(Sampler):
    """Yields the keys (epoch, index) of a `TrajectoryDataset` in an order that depends on (seed, epoch) alone.

    Args:
        multiple_of: an epoch is filled with `FILLER` up to a multiple of this many keys.
    """

    def __init__(self, length: int, seed: int, shuffle: bool, multiple_of: int = 1) -> None:
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        self.fillers = -length % multiple_of
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length + self.fillers

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.arange(self.length)
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        return ((self.epoch, int(index)) for index in (*order, *[FILLER] * self.fillers))


Examples = TrajectoryDataset | TrajectoryStream


@dataclass(frozen=True)
class ExampleReader:
    """Makes examples for a model under the settings of a run."""

    args: TabomConfig
    diffusion_model: DiffusionModel
    tokenizer: PreTrainedTokenizerBase

    def train(self, source: Any) -> Examples | None:
        """The examples to train on; a stream starts anew when it ends."""
        return self.read("train_dataset", source, None)

    def sampling_temperature(self, *sources: Any) -> float | None:
        """The temperature at which the responses of these data sets were sampled; None but for the objective `policy`.

        Raises:
            ValueError: there are several.
        """
        if self.args.objective != "policy":
            return None
        together = [each for source in sources for each in (source.values() if isinstance(source, dict) else [source])]
        found = {each.temperature for each in together if each is not None and len(each)}
        if len(found) > 1:
            raise ValueError(f"eval_dataset: sampled at another temperature than train_dataset, {sorted(found)}")
        return next(iter(found), None)

    def evaluate(self, source: Any, name: str = "eval_dataset") -> Examples | dict[str, Examples] | None:
        """The examples to evaluate; of each data set if there are several, by name."""
        if isinstance(source, Mapping):
            return {key: self.evaluate(each, f"{name}[{key!r}]") for key, each in source.items()}
        processes = self.args.world_size
        return self.read(name, source, self.args.eval_batch_size * processes if processes > 1 else 1)

    def read(self, name: str, source: Any, multiple_of: int | None) -> Examples | None:
        """The examples of one source.

        Args:
            name: what errors call the source.
            multiple_of: see `TrajectoryStream`.
        """
        if source is None or isinstance(source, Examples):
            return source
        options = {"vocab_size": self.diffusion_model.model.config.vocab_size}
        options |= self.args.tokenizing_settings(self.diffusion_model)
        settings = replace(self.args.objective_settings, block_size=self.diffusion_model.block_size)
        seed = self.args.seed
        if isinstance(source, torch.utils.data.IterableDataset | datasets.IterableDataset):
            if self.args.dataloader_num_workers > 0:
                raise ValueError(
                    f"dataloader_num_workers={self.args.dataloader_num_workers} with a streaming {name}: each worker "
                    "would read the whole stream; expected 0"
                )
            if settings.objective == "policy":
                raise ValueError(
                    f"objective='policy' with a streaming {name}: an advantage compares the responses of a group, "
                    "which must be read together; expected a data set or a list of records"
                )
            if settings.complementary_masks or settings.every_cut:
                option = "complementary_masks" if settings.complementary_masks else "every_cut"
                raise ValueError(
                    f"{option}=True with a streaming {name}: a batch of a stream holds examples, and the copies of a "
                    "record must not be parted; expected a data set or a list of records"
                )
            if isinstance(source, datasets.IterableDataset):
                source = source.with_format(None)  # values of Python, as they are read from tables
            del options["num_proc"]
            check_length = partial(check_positions, name, self.diffusion_model)
            tokenization = Tokenization(self.tokenizer, **options)
            return TrajectoryStream(source, tokenization, settings, seed, check_length, multiple_of)
        with self.args.main_process_first(desc="tokenizing"):  # the other processes read it from the cache
            examples = TrajectoryDataset(source, self.tokenizer, settings, seed, **options)
        if self.diffusion_model.logits_shift > 0 and len(examples):
            check_prompt(examples.shortest_prompt, self.diffusion_model.logits_shift)
        check_positions(name, self.diffusion_model, examples.longest)
        return examples


def check_positions(name: str, diffusion_model: DiffusionModel, longest: int) -> None:
    """Warns of records that are longer than the model's positions, if these are rotary and can be extrapolated.

    Args:
        name: of the data set.
        longest: tokens of the longest record.

    Raises:
        ValueError: the positions are a table, which ends before the longest record does.
    """
    if diffusion_model.positions is None or longest <= diffusion_model.positions:
        return
    message = (
        f"{name}: a record of {longest} tokens, and the model has {diffusion_model.positions} positions "
        "(max_position_embeddings); shorten records by max_prompt_length and max_response_length"
    )
    if getattr(diffusion_model.model.config, "rope_parameters", None) is None:
        raise ValueError(message)
    logger.warning(message)
