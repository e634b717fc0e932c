"""The prompts of a command line: where they come from, and who judges the answers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabom.data.prompts import PromptReader, PromptSet, read_prompts
from tabom.sampling.policies import check_at_least


@dataclass
class ReadingArguments:
    """How prompts are read and answers judged."""

    split: str | None = field(
        default=None,
        metadata={"help": "Split of a task, a data set or a hub name. Default: train of a task, else test."},
    )
    config_name: str | None = field(default=None, metadata={"help": "Configuration of a hub name, such as `main`."})
    prompt_column: str | None = field(default=None, metadata={"help": "Field of the prompt, if not a known one."})
    answer_column: str | None = field(default=None, metadata={"help": "Field of the answer, if not a known one."})
    prompt_template: str | None = field(
        default=None, metadata={"help": "Text file with {prompt} in it, which every prompt is put into."}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "Opens every conversation."})
    verifier: str | None = field(
        default=None,
        metadata={
            "help": "exact, contains, regex, math, code, or python:module.function. Default: by the shape of the data."
        },
    )
    answer_pattern: str | None = field(
        default=None, metadata={"help": "Of the verifier regex: a pattern whose one group is the answer."}
    )
    verifier_timeout: float | None = field(
        default=None, metadata={"help": "Seconds that math and code may take for one response. Default: 10."}
    )
    allow_code_execution: bool = field(
        default=False,
        metadata={
            "help": "Where bubblewrap does not work: run the model's programs all the same, under limits of time, "
            "memory and processes alone. They then run as a user of this machine: they can read and change what that "
            "user can, use the network, and end that user's processes."
        },
    )
    skip_invalid: bool = field(default=False, metadata={"help": "Count and skip records that do not parse."})

    def __post_init__(self) -> None:
        if self.verifier_timeout is not None and not self.verifier_timeout > 0:
            raise ValueError(f"verifier_timeout={self.verifier_timeout}: expected above 0 seconds")

    def read(self, source: str) -> PromptSet:
        """The prompts of a file, a folder or the hub; says what was left out."""
        template = Path(self.prompt_template).read_text(encoding="utf-8") if self.prompt_template else None
        reader = PromptReader(self.prompt_column, self.answer_column, template, self.system_prompt, self.verifier)
        prompts, invalid = read_prompts(
            source,
            split=self.split,
            config_name=self.config_name,
            reader=reader,
            verifier_settings=self.verifier_settings,
            skip_invalid=self.skip_invalid,
        )
        if invalid:
            print(f"{source}: {invalid} invalid lines left out")
        return prompts

    @property
    def verifier_settings(self) -> dict[str, Any]:
        """What `make_verifier` is given."""
        settings = {"pattern": self.answer_pattern, "timeout": self.verifier_timeout}
        settings["allow_code_execution"] = self.allow_code_execution or None
        return {name: value for name, value in settings.items() if value is not None}


@dataclass
class PromptArguments(ReadingArguments):
    """Which prompts are answered: a task of the lab, or somebody's own."""

    task: str | None = field(default=None, metadata={"help": "addition, subtraction, sorting, reversing or sudoku."})
    givens: int = field(default=8, metadata={"help": "Cells of the sudoku that are given."})
    num_prompts: int = field(default=1000, metadata={"help": "Prompts drawn from the task."})
    prompt_seed: int = field(default=0, metadata={"help": "Draws the task's prompts."})
    prompts: str | None = field(
        default=None,
        metadata={
            "help": "JSONL, JSON, Parquet or CSV file, folder of `datasets`, or hub name: prompts, with answers."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("num_prompts", self.num_prompts, 1)
        if not 0 <= self.givens <= 16:
            raise ValueError(f"givens={self.givens}: expected 0 to 16 cells of a sudoku of 4x4")
