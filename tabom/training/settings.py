"""The settings that `TabomConfig` adds to `TrainingArguments`. Imports no torch, so that `--help` is fast."""

from dataclasses import dataclass, field, fields
from math import isfinite
from typing import Any, Literal

from tabom.sampling.config import check_at_least
from tabom.training.renamed import accept_old_names
from tabom.training.windows import WindowSize, WindowUnit

Objective = Literal["tabom", "window", "nelbo", "nelbo_exact", "fixed_ratio", "random_ratio", "policy"]
ScaleRewards = Literal["group", "none"]
DrawnPer = Literal["block", "response"]
FirstTokenLogits = Literal["clean", "noisy"]

REPLAYED = ("tabom", "window", "policy")
"""Objectives that replay the decoding; the others mask at random."""

WITH_OBJECTIVES = {
    "min_mask_rate": ("nelbo", "random_ratio"),
    "max_mask_rate": ("nelbo", "random_ratio"),
    "complementary_masks": ("nelbo", "nelbo_exact", "fixed_ratio", "random_ratio"),
    "drawn_per": ("nelbo", "nelbo_exact", "fixed_ratio", "random_ratio"),
    "every_cut": REPLAYED,
    "tokens_per_step": REPLAYED,
    "epsilon": ("policy",),
    "epsilon_high": ("policy",),
    "scale_rewards": ("policy",),
}
"""Settings that have an effect with these objectives only."""

BLOCK_CAUSAL = ("drawn_per", "every_cut", "first_token_logits", "pad_last_block")
"""Settings that have an effect with block-causal attention only."""

MAX_FLOAT = 1e37
"""Largest absolute value of a setting: fp32 holds ten times as much."""


@accept_old_names
@dataclass
class TabomSettings:
    """Objective, data, loss and evaluation.

    Raises:
        ValueError: a number is out of its range, or `pad_response` is set without `max_response_length`.
    """

    objective: Objective = field(
        default="tabom",
        metadata={
            "help": "tabom: window cross-entropy and ranking. window: without the ranking. nelbo: each token masked "
            "with probability t, weight 1/t. nelbo_exact: k of T tokens masked, weight T/k. fixed_ratio: a fixed share "
            "masked. random_ratio: each token with probability t, equal weights. policy: learn from right and wrong "
            "responses by their rewards."
        },
    )
    supervised_window: int | str | None = field(
        default=None,
        metadata={
            "help": "M: steps (or tokens) after the cut that have a cross-entropy, or `all`. Default: 1 for policy, "
            "`all` for the other objectives."
        },
    )
    rank_window: int | str = field(
        default="all",
        metadata={
            "help": "W: steps (or tokens) after the cut that are ranked, or `all`. NELBO ranks all masked tokens."
        },
    )
    window_unit: WindowUnit = field(default="steps", metadata={"help": "What supervised_window and rank_window count."})
    rank_weight: float | None = field(
        default=None, metadata={"help": "Weight of the rank loss. Default: 0.3 for tabom, 0 for the other objectives."}
    )
    rank_loss: Literal["logistic", "hinge", "plackett_luce"] = field(
        default="logistic", metadata={"help": "Form of the rank loss."}
    )
    rank_margin: float = field(default=0.0, metadata={"help": "Margin of logistic and hinge, nats."})
    rank_temperature: float = field(
        default=1.0, metadata={"help": "Temperature tau of logistic and plackett_luce, nats."}
    )
    mask_ratio: float = field(default=0.5, metadata={"help": "Share of tokens that fixed_ratio masks."})
    min_mask_rate: float = field(default=0.0, metadata={"help": "The lowest t of nelbo and random_ratio."})
    max_mask_rate: float = field(default=1.0, metadata={"help": "The highest t of nelbo and random_ratio."})
    epsilon: float | None = field(
        default=None,
        metadata={
            "help": "Policy: the ratio of probabilities is clipped to 1 - epsilon and 1 + epsilon. Default: 0.2."
        },
    )
    epsilon_high: float | None = field(
        default=None, metadata={"help": "Policy: the upper limit is 1 + epsilon_high instead."}
    )
    scale_rewards: ScaleRewards = field(
        default="group",
        metadata={"help": "Policy: divide advantages by the standard deviation of the group's rewards, or by none."},
    )
    complementary_masks: bool = field(
        default=False,
        metadata={"help": "Learn each record twice in a batch, the second time with the other tokens masked."},
    )
    tokens_per_step: int = field(
        default=1,
        metadata={
            "help": "Tokens a step that the model is to decode well besides one a step. Above 1, parallel_share of the "
            "cuts are among the states that such a decoding passes through."
        },
    )
    parallel_share: float = field(
        default=0.2, metadata={"help": "The share of the cuts that tokens_per_step decides; the others are any step."}
    )
    cut_among_non_ltr: bool = field(
        default=False, metadata={"help": "Draw the cut among the steps of the record's non_ltr_positions."}
    )
    skip_last_step: bool = field(
        default=False, metadata={"help": "Draw the cut up to s_max - M, as released: the last step is never learnt."}
    )
    rank_ties: bool = field(
        default=False,
        metadata={"help": "Rank tokens of one step as if unmasked one by one: by entropy, else left to right."},
    )
    drop_short: bool = field(
        default=False, metadata={"help": "Learn nothing from trajectories of no more than supervised_window steps."}
    )
    drawn_per: DrawnPer = field(
        default="block",
        metadata={
            "help": "What a block-causal model draws a masking rate for: each block, or a whole response (random "
            "masking only). A cut is always drawn for each block."
        },
    )
    every_cut: bool = field(
        default=False,
        metadata={
            "help": "Block-causal models: learn each record at all cuts, supervised_window steps apart, in one batch."
        },
    )
    first_token_logits: FirstTokenLogits = field(
        default="clean",
        metadata={
            "help": "Block-causal models with shifted logits: which copy of the block before predicts the first token "
            "of a block; in decoding it is the clean one."
        },
    )
    loss_average: Literal["global_batch", "micro_batch"] = field(
        default="global_batch",
        metadata={
            "help": "How the loss is averaged over tokens and sequences: over all micro-batches and ranks of a step, "
            "or over each micro-batch, and then over micro-batches and ranks."
        },
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Tokens; longer prompts lose the end of their last message. Default: no limit."}
    )
    max_response_length: int | None = field(
        default=None, metadata={"help": "Tokens; longer responses lose their end. Default: no limit."}
    )
    pad_response: bool = field(
        default=False,
        metadata={"help": "Fill responses up to max_response_length with padding to be learnt, decoded last."},
    )
    pad_last_block: bool = field(
        default=False,
        metadata={"help": "Block-causal models: fill the last block with padding to be learnt, decoded last."},
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenize the data. Default: one."}
    )
    peer_timeout: float = field(
        default=300.0,
        metadata={"help": "With several processes: seconds without a sign of life of one, after which the others end."},
    )
    loss_backend: Literal["triton", "torch", "reference"] | None = field(
        default=None, metadata={"help": "Backend of tabom_kernels. Default: the best for the device."}
    )
    fused_linear: bool = field(
        default=True,
        metadata={
            "help": "Compute the head together with the loss and never hold its logits, where the head allows it. "
            "False: the logits of the selected rows."
        },
    )
    eval_prompts: str | None = field(
        default=None,
        metadata={
            "help": "Prompts that are decoded and judged at every evaluation. The share of right responses is the "
            "figure eval_accuracy, which then chooses the best checkpoint."
        },
    )
    eval_verifier: str | None = field(
        default=None, metadata={"help": "Verifier of the responses to eval_prompts. Default: by the shape of the data."}
    )
    eval_num_prompts: int | None = field(
        default=None, metadata={"help": "How many of eval_prompts are used, from the first on. Default: all."}
    )
    eval_sampler: str | None = field(
        default=None, metadata={"help": "How eval_prompts are decoded, as field=value,field=value of the sampler."}
    )

    def __post_init__(self) -> None:
        if self.supervised_window is None:
            self.supervised_window = 1 if self.objective == "policy" else "all"
        self.supervised_window = window_size("supervised_window", self.supervised_window)
        self.rank_window = window_size("rank_window", self.rank_window)
        if self.rank_weight is None:
            self.rank_weight = 0.3 if self.objective == "tabom" else 0.0
        for name in ("max_prompt_length", "max_response_length", "eval_num_prompts", "peer_timeout"):
            check_at_least(name, getattr(self, name), 1)
        if self.pad_response and self.max_response_length is None:
            raise ValueError("pad_response=True with max_response_length=None: give the length to fill up to")
        for each in fields(TabomSettings):
            value = getattr(self, each.name)
            if isinstance(value, float) and not isfinite(value):
                raise ValueError(f"{each.name}={value}: expected a finite number")
            if isinstance(value, float) and abs(value) > MAX_FLOAT:
                raise ValueError(f"{each.name}={value}: expected at most {MAX_FLOAT}, because losses are in fp32")
        if self.objective == "policy":
            self.check_policy()
        if not 0 <= self.min_mask_rate <= self.max_mask_rate <= 1:
            raise ValueError(
                f"min_mask_rate={self.min_mask_rate} with max_mask_rate={self.max_mask_rate}: expected shares in "
                "[0, 1], in rising order"
            )
        for name, objectives in WITH_OBJECTIVES.items():
            if self.objective not in objectives and (value := self.changed(name)) is not None:
                raise ValueError(
                    f"{name}={value!r} with objective={self.objective!r}: it has an effect with "
                    f"{', '.join(objectives)} only"
                )
        for name in ("cut_among_non_ltr", "skip_last_step", "tokens_per_step") if self.every_cut else ():
            if (value := self.changed(name)) is not None:
                raise ValueError(f"{name}={value!r} with every_cut=True: no cut is drawn; use one of the two")
        self.check_parallel()
        if self.every_cut and self.window_unit == "tokens":
            raise ValueError("window_unit='tokens' with every_cut=True: the cuts are whole steps apart; use 'steps'")
        check_at_least("rank_weight", self.rank_weight, 0)
        if not self.rank_temperature > 0:
            raise ValueError(f"rank_temperature={self.rank_temperature}: expected above 0 nats")
        if not 0 < self.mask_ratio <= 1:
            raise ValueError(f"mask_ratio={self.mask_ratio}: expected a share in (0, 1]")

    def check_parallel(self) -> None:
        """Raises a ValueError for a pace or share that is out of its range or has no effect."""
        check_at_least("tokens_per_step", self.tokens_per_step, 1)
        if not 0 < self.parallel_share <= 1:
            raise ValueError(f"parallel_share={self.parallel_share}: expected a share in (0, 1]")
        if self.tokens_per_step == 1 and self.changed("parallel_share") is not None:
            raise ValueError(
                f"parallel_share={self.parallel_share} with tokens_per_step=1: all cuts are those of one token a step; "
                "give tokens_per_step as well"
            )

    def check_policy(self) -> None:
        """Raises a ValueError for settings that a policy loss cannot have, or that have no effect on it."""
        for name in ("epsilon", "epsilon_high"):
            check_at_least(name, getattr(self, name), 0)
            if getattr(self, name) is not None and not has_ratios(self.supervised_window, self.window_unit):
                raise ValueError(
                    f"{name}={getattr(self, name)} with supervised_window={self.supervised_window!r} and "
                    f"window_unit={self.window_unit!r}: the recorded log-probabilities are of one step each, so only "
                    "supervised_window=1 in steps has ratios to clip; leave it out"
                )
        if not self.fused_linear:
            raise ValueError(
                "fused_linear=False with objective='policy': its loss is computed in the head; leave it out"
            )

    @property
    def clip(self) -> tuple[float, float]:
        """How far a ratio may be below and above 1."""
        below = 0.2 if self.epsilon is None else self.epsilon
        return below, below if self.epsilon_high is None else self.epsilon_high

    @property
    def loss_settings(self) -> dict[str, Any]:
        """The settings that `add_loss_to_forward` takes, under the names of `tabom_kernels`."""
        return {
            "rank_weight": self.rank_weight,
            "form": self.rank_loss,
            "margin": self.rank_margin,
            "temperature": self.rank_temperature,
            "backend": self.loss_backend,
            "fused_linear": self.fused_linear,
            **({"clip": self.clip} if self.objective == "policy" else {}),
        }

    def changed(self, name: str) -> Any:
        """The value of a setting, or None where it is the default."""
        (default,) = (each.default for each in fields(TabomSettings) if each.name == name)
        value = getattr(self, name)
        return None if value == default else value

    def check_attention(self, block_size: int | None, logits_shift: int) -> None:
        """Raises a ValueError for a setting that has no effect with the attention of a model.

        Args:
            block_size: of block-causal attention; None: full attention.
            logits_shift: how many positions before a token its logits stand.
        """
        for name in BLOCK_CAUSAL if block_size is None else ():
            if (value := self.changed(name)) is not None:
                raise ValueError(f"{name}={value!r}: it has an effect with block-causal models only; leave it out")
        if block_size is not None and self.drop_short:
            raise ValueError(
                f"drop_short=True with block_size={block_size}: every block is learnt, however few its steps; leave it "
                "out"
            )
        if self.first_token_logits == "noisy" and logits_shift == 0:
            raise ValueError("first_token_logits='noisy': the logits of this model are not shifted; leave it out")


def has_ratios(supervised_window: WindowSize, window_unit: WindowUnit) -> bool:
    """Whether a policy loss has ratios to the recorded log-probabilities, each of which is that of a single step."""
    return supervised_window == 1 and window_unit == "steps"


def window_size(name: str, value: int | str) -> WindowSize:
    """A window size, from text or a number."""
    if value == "all":
        return "all"
    if not str(value).isdecimal() or int(value) < 1:
        raise ValueError(f"{name}={value}: expected a number of at least 1, or all")
    return int(value)
