"""Trajectories from a stream: records are read and tokenized when their turn comes, in the order of the stream."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

from torch.utils.data import IterableDataset

from tabom.data.shapes import warn_of_unused
from tabom.data.sources import present
from tabom.data.tokenized import Tokenization, TokenizedTrajectory
from tabom.data.trajectories import misplaced
from tabom.training.objectives import Example, ObjectiveSettings, make_examples


class TrajectoryStream(IterableDataset):
    """Examples of a stream. The cut of a record depends on the pass and on its place in the stream.

    Args:
        source: an iterable of records or trajectories, such as a `datasets.IterableDataset`. Its `set_epoch`, if it has
            one, is called with the number of the pass, so that it can shuffle anew.
        check_length: called with the tokens of each record that is longer than all before it.
        multiple_of: None, for training: passes without end, because the trainer counts steps. Else one pass, filled
            with None up to a multiple of this many examples, so that all processes have as many batches.
    """

    digest = "a stream"
    """The data in the description of the run. So a run that is resumed with another stream is not refused."""

    def __init__(
        self,
        source: Any,
        tokenization: Tokenization,
        settings: ObjectiveSettings,
        seed: int,
        check_length: Callable[[int], None],
        multiple_of: int | None = None,
    ) -> None:
        self.source, self.tokenization, self.settings, self.seed = source, tokenization, settings, seed
        self.check_length, self.multiple_of = check_length, multiple_of
        self.origins: Counter[tuple[str | None, str | None]] = Counter()
        self.longest = 0
        self.unused: set[str] = set()

    def __iter__(self) -> Iterator[Example | None]:
        for epoch in count():
            if hasattr(self.source, "set_epoch"):
                self.source.set_epoch(epoch)
            index = -1
            for index, trajectory in enumerate(self.trajectories(is_first_pass=epoch == 0)):
                yield from make_examples(trajectory, self.settings, self.seed, epoch, index)
            if self.multiple_of is not None:
                yield from [None] * (-(index + 1) % self.multiple_of)
                return
            if index < 0:
                raise ValueError("train_dataset: the stream holds no record")

    def trajectories(self, is_first_pass: bool) -> Iterator[TokenizedTrajectory]:
        """The tokenized trajectories of one pass.

        Raises:
            ValueError: a record is invalid; names its place in the stream.
        """
        for number, record in enumerate(self.source, 1):
            try:
                row = self.tokenization.row(present(record) if isinstance(record, dict) else record)
            except ValueError as error:
                raise misplaced(None, f"record {number}", error) from error
            if unused := set(row["unused"]) - self.unused:
                self.unused |= unused
                warn_of_unused(None, unused)
            if is_first_pass:
                self.origins[row["data_source"], row["method"]] += 1
            trajectory = TokenizedTrajectory.of(row)
            length = len(trajectory.prompt_token_ids) + len(trajectory.response_token_ids)
            if length > self.longest:
                self.longest = length
                self.check_length(length)
            yield trajectory

    def has_targets(self) -> bool:
        """True: a stream is not read before the training."""
        return True

    def count_origins(self) -> Counter[tuple[str | None, str | None]]:
        """The number of trajectories of each data source and method that the first pass has read."""
        return self.origins
