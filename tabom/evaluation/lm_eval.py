"""Runs our models in lm-evaluation-harness (extra `eval`):

    python -m tabom.evaluation.lm_eval --model tabom --model_args pretrained=FOLDER,policy=entropy --tasks gsm8k

The command line is lm-eval's own. Under torchrun or accelerate the processes share the requests.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple, fields, replace
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from tabom.evaluation.likelihood import nelbo_log_likelihood, trajectory_log_likelihood
from tabom.models.diffusion_model import DiffusionModel
from tabom.models.loading import load
from tabom.sampling.completions import decode_response, response_length, with_block_length
from tabom.sampling.config import SamplerConfig
from tabom.sampling.engine import Engine, EngineConfig, Request

GENERATION_KWARGS = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k")
"""What a request may ask for, after lm-eval has made one name of `max_gen_toks`, `max_new_tokens` and `max_tokens`."""

NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0}
"""Values of other names that ask for nothing."""


@register_model("tabom")
class TabomLM(TemplateLM):
    """A diffusion language model for lm-eval.

    Args:
        pretrained: folder or hub name, or a loaded model.
        batch_size: how many of the longest prompts are decoded at once; shorter ones pack more. Also the rows of a
            likelihood's forward pass.
        device, max_batch_size: passed by lm-eval and ignored; accelerate chooses the device, and batches have one size.
        dtype: of the weights, such as `bfloat16`.
        likelihood: `nelbo`, LLaDA's Monte-Carlo bound, or `trajectory`, the likelihood in the order of the policy. Both
            go block by block for block-causal models (`tabom.evaluation.likelihood`).
        nelbo_samples: number of draws for the bound.
        check_greedy: also decode, for metrics that need to know whether a continuation is the greedy one.
        max_length: tokens of a prompt; longer ones lose their beginning. Default: no limit.
        attn_implementation, trust_remote_code, block_size, mask_token_id: arguments of `tabom.load`.
        sampler: any field of `SamplerConfig`. A task's `max_gen_toks` (or `max_new_tokens`, `max_tokens`) is the length
            of its responses where `max_new_tokens` is not given here. Its `temperature`, `top_p` and `top_k` count
            where it asks to sample.
    """

    def __init__(
        self,
        pretrained: str | DiffusionModel,
        batch_size: int | str = 16,
        device: str | None = None,
        dtype: str = "float32",
        likelihood: Literal["nelbo", "trajectory"] = "nelbo",
        nelbo_samples: int = 128,
        check_greedy: bool = True,
        max_length: int | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        block_size: int | None = None,
        mask_token_id: int | None = None,
        max_batch_size: int | None = None,
        **sampler: Any,
    ) -> None:
        super().__init__()
        known = {each.name for each in fields(SamplerConfig)}
        for name, value in sampler.items():
            if name not in known:
                raise ValueError(f"model_args {name}={value!r}: neither an argument of tabom nor of its sampler")
        if likelihood not in ("nelbo", "trajectory"):
            raise ValueError(f"likelihood={likelihood!r}: expected nelbo or trajectory")
        self.state = PartialState()
        self._rank, self._world_size = self.state.process_index, self.state.num_processes
        if isinstance(pretrained, str):
            pretrained = load(
                pretrained,
                dtype=getattr(torch, dtype),
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
                block_size=block_size,
                mask_token_id=mask_token_id,
            )
            pretrained.model.to(self.state.device)
        elif block_size is not None or mask_token_id is not None:
            raise ValueError(
                f"block_size={block_size}, mask_token_id={mask_token_id} with a loaded model: give them to tabom.load"
            )
        self.model = pretrained
        self.tokenizer = pretrained.tokenizer
        self._device = pretrained.device
        self.batch_size = 16 if str(batch_size).startswith("auto") else int(batch_size)
        self.likelihood, self.nelbo_samples, self.check_greedy = likelihood, int(nelbo_samples), check_greedy
        self.max_length = max_length
        self.sampler = SamplerConfig(**sampler)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a response."""
        return self.model.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's caches."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text, for `--apply_chat_template`."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; a rendered conversation already has its special tokens."""
        rendered = self.tokenizer.chat_template is not None and any(
            token and token in string for token in self.tokenizer.all_special_tokens
        )
        special = not rendered if add_special_tokens is None else add_special_tokens
        return self.tokenizer(string, add_special_tokens=special).input_ids

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Decodes responses, those with the same settings together, and cuts them at `until`."""
        groups: dict[tuple, list[int]] = defaultdict(list)
        encoded = [self.tok_encode(request.args[0])[-(self.max_length or 0) :] for request in requests]
        settings = [self.settings_for(request.args[1]) for request in requests]
        for index in sorted(range(len(requests)), key=lambda index: len(encoded[index])):
            groups[astuple(settings[index])].append(index)
        responses = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank > 0, desc="decoding") as bar:
            for indices in groups.values():
                config = settings[indices[0]]
                waiting = [Request(encoded[index], config.max_new_tokens, config.seed) for index in indices]
                budget = self.batch_size * max(len(request.prompt) + request.length for request in waiting)
                for number, completion in Engine(self.model, config, EngineConfig(budget)).run(waiting):
                    index = indices[number]
                    text = decode_response(self.model, completion.token_ids)
                    responses[index] = cut(text, requests[index].args[1].get("until"))
                    self.cache_hook.add_partial("generate_until", requests[index].args, responses[index])
                    bar.update()
        return responses

    def settings_for(self, asked: dict[str, Any]) -> SamplerConfig:
        """The sampler of one request, whose `generation_kwargs` are read as lm-eval reads them for other models.

        A temperature above 0 samples, unless `do_sample` is False; then neither it nor `top_p` and `top_k` count.

        Raises:
            ValueError: the request asks for something that the sampler does not do.
        """
        kwargs = normalize_gen_kwargs(asked, response_length(self.model, self.sampler))
        for name, value in kwargs.items():
            if name not in GENERATION_KWARGS and NEUTRAL.get(name) != value:
                raise ValueError(
                    f"generation_kwargs {name}={value!r}: not done by tabom's sampler, which takes "
                    f"{', '.join(GENERATION_KWARGS)}; take it out of the task or of --gen_kwargs"
                )
        length = self.sampler.max_new_tokens or kwargs["max_gen_toks"]
        if not kwargs["do_sample"]:
            return replace(self.sampler, max_new_tokens=length)
        chosen = {"temperature": float(kwargs.get("temperature", 1.0))}
        if "top_p" in kwargs:
            chosen["top_p"] = float(kwargs["top_p"])
        if "top_k" in kwargs:
            chosen["top_k"] = None if int(kwargs["top_k"]) in (0, -1) else int(kwargs["top_k"])
        return replace(self.sampler, max_new_tokens=length, **chosen)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results = []
        for pair, context, continuation in tqdm(requests, disable=disable_tqdm or self.rank > 0, desc="likelihood"):
            results.append(self.log_likelihood(context[-(self.max_length or 0) :], continuation))
            self.cache_hook.add_partial("loglikelihood", pair, results[-1])
        return results

    def log_likelihood(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """The log-likelihood in nats, and whether greedy decoding gives this continuation."""
        along, is_greedy = 0.0, False
        if self.likelihood == "trajectory" or self.check_greedy:
            along, is_greedy = trajectory_log_likelihood(self.model, context, continuation, self.sampler)
        if self.likelihood == "trajectory":
            return along, is_greedy
        model = with_block_length(self.model, self.sampler)
        bound = nelbo_log_likelihood(
            model, context, continuation, self.nelbo_samples, self.sampler.seed, self.batch_size
        )
        return bound, is_greedy

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in one piece, behind the end token that lm-eval starts texts with."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        return [self.log_likelihood([self.prefix_token_id], text)[0] for text in tqdm(texts, disable=disable_tqdm)]

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all ranks, one after the other."""
        return gather(tensor.to(self.state.device).reshape(-1))

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all ranks, on rank `dst`."""
        found = gather_object([obj])
        return found if self.rank == dst else None

    def barrier(self) -> None:
        """Waits for all ranks."""
        self.state.wait_for_everyone()


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """The text before the first of the strings that end it."""
    for stop in [until] if isinstance(until, str) else until or []:
        if stop:
            text = text.partition(stop)[0]
    return text


if __name__ == "__main__":
    cli_evaluate()
