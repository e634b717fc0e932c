"""Settings of an evaluation. Imports no torch, so that the command line can check them quickly."""

from dataclasses import dataclass, field

from tabom.sampling.config import check_at_least


@dataclass
class EvaluateConfig:
    """How many responses are made and where they are stored."""

    output_dir: str = field(metadata={"help": "Folder of answers and results; a second run on it continues it."})
    samples_per_prompt: int = field(
        default=1, metadata={"help": "Answers a prompt, with seeds seed, seed + 1, ... Needs temperature > 0."}
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Tokens; longer prompts lose the end of their last message. Default: no limit."}
    )
    peer_timeout: float = field(
        default=300.0,
        metadata={"help": "With several processes: seconds without a sign of life of one, after which the others end."},
    )

    def __post_init__(self) -> None:
        for name in ("samples_per_prompt", "max_prompt_length", "peer_timeout"):
            check_at_least(name, getattr(self, name), 1)
