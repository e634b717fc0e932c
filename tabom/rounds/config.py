"""Settings of `tabom improve`. Imports no torch, so that the command line can check them quickly."""

from dataclasses import dataclass, field

from tabom.sampling.config import check_at_least


@dataclass
class ImproveConfig:
    """How many rounds there are, and what each of them decodes."""

    rounds: int = field(
        default=8, metadata={"help": "Rounds in all; a second run with more of them continues where the first ended."}
    )
    samples_per_prompt: int = field(default=8, metadata={"help": "Responses to each prompt of a round."})
    prompts_per_round: int | None = field(
        default=None, metadata={"help": "Prompts that are drawn for a round. Default: all of them."}
    )
    settled_weight: float = field(
        default=1.0,
        metadata={
            "help": "Below 1: prompts whose responses were all right, or all wrong, when they were last drawn are "
            "drawn less often, with this weight instead of 1. Needs prompts_per_round."
        },
    )
    sampler: str = field(
        default="temperature=1",
        metadata={"help": "How the responses are sampled, as field=value,field=value of the sampler."},
    )
    eval_every: int = field(default=1, metadata={"help": "Rounds between two evaluations on eval_prompts."})
    eval_samples: int = field(
        default=1,
        metadata={"help": "Responses to each of eval_prompts, sampled like those of the rounds, for pass@k."},
    )

    def __post_init__(self) -> None:
        for name in ("rounds", "prompts_per_round", "eval_every", "eval_samples"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("samples_per_prompt", self.samples_per_prompt, 2)
        if not 0 < self.settled_weight <= 1:
            raise ValueError(f"settled_weight={self.settled_weight}: expected a weight in (0, 1]")
        if self.settled_weight < 1 and self.prompts_per_round is None:
            raise ValueError(
                f"settled_weight={self.settled_weight} without prompts_per_round: every round has all prompts, so none "
                "is drawn; give both"
            )
