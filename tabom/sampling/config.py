"""Settings of sampling and collecting. Imports no torch, so that the command line can read and check them at once."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import yaml

POLICY_NAMES = (
    "entropy",
    "confidence",
    "margin",
    "random",
    "threshold",
    "entropy_bound",
    "dream_origin",
    "dream_maskgit_plus",
    "dream_topk_margin",
    "dream_entropy",
    "llada_low_confidence",
    "llada_random",
    "sdar_static",
    "sdar_dynamic",
    "sdar_sequential",
    "llada2",
    "llada2_edit",
    "fast_dllm",
)
"""The unmasking policies, which `tabom.sampling.policies` implements."""

FINDS_ITS_PACE = ("threshold", "entropy_bound", "llada2_edit", "fast_dllm")
"""Policies whose number of steps is found on the way, and not planned."""

RANDOM_ORDER = ("random", "dream_origin", "llada_random")
"""Policies that unmask in a random order."""


class Blocks(NamedTuple):
    """How a response is cut into blocks, which are decoded from left to right.

    Each of the `count` blocks has `size` positions and takes at most `steps` steps. The first block begins with `given`
    tokens of the prompt, if the prompt does not end with a whole block (block-causal attention only).
    """

    count: int
    size: int
    given: int
    steps: int

    @property
    def length(self) -> int:
        """Tokens of the response."""
        return self.count * self.size - self.given


def check_at_least(name: str, value: float | None, least: int) -> None:
    """Raises a ValueError that names the setting, unless it is None."""
    if value is not None and not value >= least:  # NaN neither
        raise ValueError(f"{name}={value}: expected at least {least}")


def check_output_file(name: str, value: str) -> None:
    """Raises a ValueError if a file to be written is a folder."""
    if Path(value).is_dir():
        raise ValueError(f"{name}={value}: a folder; give the name of a file")


@dataclass
class PolicySettings:
    """Which policy, and the numbers that policies read.

    Raises:
        ValueError: settings that contradict each other.
    """

    policy: str = field(
        default="entropy",
        metadata={
            "help": "What is unmasked first: lowest entropy, highest probability (confidence), largest top-2 margin, "
            "or random; or as many as a threshold or entropy_bound allows; or as Dream, LLaDA, SDAR, LLaDA2 and "
            "Fast-dLLM v2 do.",
            "choices": sorted(POLICY_NAMES),
        },
    )
    tokens_per_step: int | None = field(
        default=None, metadata={"help": "Tokens unmasked in one step. Default 1; excludes steps."}
    )
    steps: int | None = field(
        default=None,
        metadata={
            "help": "Total denoising steps, shared evenly by the blocks, or with block-causal attention the steps of "
            "each block; excludes tokens_per_step."
        },
    )
    alg_temp: float = field(
        default=0.0, metadata={"help": "Temperature of the choice of positions (Dream); 0 takes the most certain."}
    )
    eps: float = field(default=1e-3, metadata={"help": "Where the time of the dream_ policies ends."})
    threshold: float = field(
        default=0.9,
        metadata={
            "help": "Probability from which the threshold policy unmasks, and above which sdar_dynamic (there "
            "0.85), llada2 (0.95), llada2_edit and fast_dllm do."
        },
    )
    entropy_bound: float = field(default=0.1, metadata={"help": "Bound of the entropy_bound policy, nats."})

    def __post_init__(self) -> None:
        if self.policy not in POLICY_NAMES:
            raise ValueError(f"policy={self.policy!r}: expected one of {', '.join(POLICY_NAMES)}")
        for name in ("tokens_per_step", "steps"):
            check_at_least(name, getattr(self, name), 1)
        for name in ("alg_temp", "entropy_bound"):
            check_at_least(name, getattr(self, name), 0)
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold}: expected a probability in [0, 1]")
        if not 0 < self.eps < 1:
            raise ValueError(f"eps={self.eps}: expected a time in (0, 1)")
        if self.tokens_per_step is not None and self.steps is not None:
            raise ValueError(f"tokens_per_step={self.tokens_per_step} and steps={self.steps}: give only one of them")
        pace = [name for name in ("tokens_per_step", "steps") if getattr(self, name) is not None]
        if pace and self.policy in FINDS_ITS_PACE:
            raise ValueError(f"{pace[0]}={getattr(self, pace[0])} with policy={self.policy!r}: it finds its own pace")
        if self.tokens_per_step is not None and self.policy.startswith("dream_"):
            raise ValueError(f"tokens_per_step={self.tokens_per_step} with policy={self.policy!r}: give steps")
        if self.alg_temp > 0 and self.policy in RANDOM_ORDER:
            raise ValueError(
                f"alg_temp={self.alg_temp} with policy={self.policy!r}: this policy already draws the order at random"
            )

    @property
    def order_is_random(self) -> bool:
        """Whether another seed can unmask in another order."""
        return self.alg_temp > 0 or self.policy in RANDOM_ORDER


@dataclass
class SamplerConfig(PolicySettings):
    """How responses are decoded.

    Raises:
        ValueError: settings that contradict each other.
    """

    max_new_tokens: int | None = field(
        default=None,
        metadata={"help": "Length of the response, tokens. Default: the model's generation config."},
    )
    block_length: int | None = field(
        default=None,
        metadata={
            "help": "Decode blocks of this many tokens left to right. Default: one block, or with block-causal "
            "attention the model's block size, which this overrides."
        },
    )
    sub_block_length: int | None = field(
        default=None,
        metadata={"help": "Decode each block in parts of this many tokens left to right. Default: 8 for fast_dllm."},
    )
    editing_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Of llada2_edit: probability above which another token replaces a decided one of the active block. "
            "Default: 0.9."
        },
    )
    max_post_steps: int | None = field(
        default=None,
        metadata={"help": "Of llada2_edit: steps at most in which a block without masks is edited. Default: 16."},
    )
    temperature: float = field(default=0.0, metadata={"help": "Temperature of the token choice; 0 is greedy."})
    top_k: int | None = field(default=None, metadata={"help": "Sample among the k most probable tokens."})
    top_p: float | None = field(default=None, metadata={"help": "Sample within this probability mass."})
    stop_early: bool = field(
        default=False,
        metadata={"help": "Stop once all before the first end token is decided; the rest is padding, never unmasked."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the tokens and of the random policies."})
    cache: Literal["none", "prefix", "block"] = field(
        default="none",
        metadata={
            "help": "Keep keys and values of what stands before the active block (prefix), or of all but the block "
            "(block). Faster, and an approximation; none is exact."
        },
    )
    cache_refresh: int | None = field(
        default=None,
        metadata={"help": "Steps after which a cache is computed anew. Default: when a block begins, and only then."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_new_tokens", "block_length", "sub_block_length", "max_post_steps", "top_k", "cache_refresh"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("temperature", self.temperature, 0)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: expected a probability mass in (0, 1]")
        for name in ("editing_threshold", "max_post_steps"):
            if getattr(self, name) is not None and self.policy != "llada2_edit":
                raise ValueError(f"{name}={getattr(self, name)} with policy={self.policy!r}: only llada2_edit edits")
        if self.editing_threshold is not None and not 0 <= self.editing_threshold <= 1:
            raise ValueError(f"editing_threshold={self.editing_threshold}: expected a probability in [0, 1]")
        if self.sub_block_length is not None and self.policy not in FINDS_ITS_PACE:
            raise ValueError(
                f"sub_block_length={self.sub_block_length} with policy={self.policy!r}: its steps are planned for "
                f"whole blocks; use one of {', '.join(FINDS_ITS_PACE)}"
            )
        if self.cache not in ("none", "prefix", "block"):
            raise ValueError(f"cache={self.cache!r}: expected none, prefix or block")
        if self.cache == "none" and self.cache_refresh is not None:
            raise ValueError(f"cache_refresh={self.cache_refresh} with cache='none': give a cache, prefix or block")

    @property
    def is_random(self) -> bool:
        """Whether another seed can give another answer."""
        return self.temperature > 0 or self.order_is_random

    @property
    def cache_name(self) -> str | None:
        """As trajectories record it: which cache, and after how many steps it is refreshed; None is exact."""
        if self.cache == "none":
            return None
        return self.cache if self.cache_refresh is None else f"{self.cache}, refresh {self.cache_refresh}"

    def plan(self, length: int, prompt_length: int = 0, block_size: int | None = None) -> Blocks:
        """How a response of `length` tokens is cut into blocks.

        Args:
            block_size: of block-causal attention, whose blocks are counted from the first token of the prompt; the
                response is then rounded up to whole blocks.

        Raises:
            ValueError: the steps do not share out over the blocks and tokens.
        """
        if block_size is not None:
            if self.policy.startswith("dream_"):
                raise ValueError(f"policy={self.policy!r} with block-causal attention: its time runs over one block")
            given = prompt_length % block_size
            steps = math.ceil(block_size / (self.tokens_per_step or 1)) if self.steps is None else self.steps
            if steps > block_size:
                raise ValueError(
                    f"steps={steps}: expected at most {block_size}, so that every step of a block unmasks a token"
                )
            return Blocks(math.ceil((given + length) / block_size), block_size, given, steps)
        tokens = min(self.block_length or length, length)
        if length % tokens:
            raise ValueError(f"block_length={tokens}: expected a divisor of the response length {length}")
        count = length // tokens
        if self.steps is None:
            return Blocks(count, tokens, 0, math.ceil(tokens / (self.tokens_per_step or 1)))
        steps, rest = divmod(self.steps, count)
        if rest:
            raise ValueError(f"steps={self.steps}: expected a multiple of the {count} blocks")
        if steps > tokens and not self.policy.startswith("dream_"):
            raise ValueError(f"steps={self.steps}: expected at most {length}, so that every step unmasks a token")
        return Blocks(count, tokens, 0, steps)


def parse_sampler(text: str, base: SamplerConfig) -> SamplerConfig:
    """Parses changes to other settings, such as `steps=64,policy=confidence`.

    Raises:
        ValueError: a name that is no field of `SamplerConfig`.
    """
    known = get_type_hints(SamplerConfig)
    changes = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in known:
            raise ValueError(f"sampler {text!r}: {name!r} is none of {', '.join(sorted(known))}")
        changes[name] = parse_value(name, value, known[name])
    return replace(base, **changes)


KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
"""What a setting's type is called in an error."""


def parse_value(name: str, text: str, annotation: Any) -> Any:
    """Parses the value of a setting in YAML syntax.

    Raises:
        ValueError: not a value of this type.
    """
    kinds = get_args(annotation) or (annotation,)  # the values of a Literal
    types = tuple((int, float) if kind is float else kind for kind in kinds if isinstance(kind, type))
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if value not in kinds and not isinstance(value, types):
        expected = " or ".join(KINDS.get(kind, str(kind)) for kind in kinds)
        raise ValueError(f"{name}={text}: expected {expected}")
    return value


@dataclass
class EngineConfig:
    """How much is computed at once; changes no answer."""

    compute_budget: int | None = field(
        default=None, metadata={"help": "Positions a decoding step computes at most. Default: what memory allows."}
    )
    look_every: int = field(
        default=1,
        metadata={"help": "Decoding steps after which the host reads from the device what was decided. Caches need 1."},
    )
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = field(
        default="none",
        metadata={
            "help": "torch.compile the model's layers, in this mode; rows are padded to a few sizes. reduce-overhead "
            "captures CUDA graphs on a GPU."
        },
    )

    def __post_init__(self) -> None:
        for name in ("compute_budget", "look_every"):
            check_at_least(name, getattr(self, name), 1)
        modes = ("none", "default", "reduce-overhead", "max-autotune")
        if self.compile not in modes:
            raise ValueError(f"compile={self.compile!r}: expected one of {', '.join(modes)}")


@dataclass
class CollectConfig:
    """How many attempts are made and where the right ones go."""

    output: str = field(metadata={"help": "JSONL file of trajectories; a second run on the same file continues it."})
    samples_per_prompt: int = field(
        default=1,
        metadata={"help": "Attempts a prompt, with seeds seed, seed + 1, ... Needs temperature > 0."},
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Tokens; longer prompts lose the end of their last message. Default: no limit."}
    )
    give_up: bool = field(
        default=False,
        metadata={
            "help": "Leave an answer as it stands once it begins as no right one can; right answers stay what they "
            "are. The verifier must be able to tell: exact can."
        },
    )
    completions: str | None = field(
        default=None,
        metadata={
            "help": "JSONL file of responses that another engine has returned, with the step of each token: they are "
            "judged and recorded, and nothing is decoded."
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Delete what an earlier run wrote and start anew."})
    peer_timeout: float = field(
        default=300.0,
        metadata={"help": "With several processes: seconds without a sign of life of one, after which the others end."},
    )

    def __post_init__(self) -> None:
        check_output_file("output", self.output)
        if self.completions is not None and not Path(self.completions).is_file():
            raise FileNotFoundError(f"completions={self.completions}: no such file")
        for name in ("samples_per_prompt", "max_prompt_length", "peer_timeout"):
            check_at_least(name, getattr(self, name), 1)
