"""Our models in lm-evaluation-harness (extra `eval`):

    python -m tabom.evaluation.lm_eval --model tabom --model_args pretrained=FOLDER,policy=entropy --tasks gsm8k

The command line is lm-eval's own. Under torchrun or accelerate every process answers its share.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from tabom.evaluation.likelihood import nelbo_log_likelihood, trajectory_log_likelihood
from tabom.models.diffusion_model import DiffusionModel
from tabom.models.loading import load
from tabom.sampling.engine import Engine, EngineConfig, Request
from tabom.sampling.sampler import SamplerConfig, decode_response, response_length


@register_model("tabom")
class TabomLM(TemplateLM):
    """A diffusion language model for lm-eval.

    Args:
        pretrained: folder or hub name, or a loaded model.
        batch_size: of the longest prompts, decoded together; a finished one makes room for the next. Also rows of a
            likelihood's forward pass.
        device, max_batch_size: what lm-eval passes; accelerate chooses the device, and batches have one size.
        dtype: of the weights, such as `bfloat16`.
        likelihood: `nelbo`, LLaDA's Monte-Carlo bound, or `trajectory`, along the order of the policy.
        nelbo_samples: draws of the bound.
        check_greedy: decode along with the bound, for metrics that ask whether a continuation is the greedy one.
        max_length: tokens of a prompt; longer ones lose their beginning. Default: no limit.
        attn_implementation, trust_remote_code: of `tabom.load`.
        sampler: any field of `SamplerConfig`. A task's `max_gen_toks` is the length of its responses where
            `max_new_tokens` is not given, its `temperature` counts where it asks to sample.
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
            )
            pretrained.model.to(self.state.device)
        self.family = pretrained
        self.tokenizer = pretrained.tokenizer
        self._device = pretrained.device
        self.batch_size = 16 if str(batch_size).startswith("auto") else int(batch_size)
        self.likelihood, self.nelbo_samples, self.check_greedy = likelihood, int(nelbo_samples), check_greedy
        self.max_length = max_length
        self.sampler = SamplerConfig(**sampler)

    @property
    def eot_token_id(self) -> int:
        """What ends a response."""
        return self.family.eos_token_id

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
        """Decodes responses, those of one length and one temperature together, and cuts them at `until`."""
        groups: dict[tuple, list[int]] = defaultdict(list)
        encoded = [self.tok_encode(request.args[0])[-(self.max_length or 0) :] for request in requests]
        settings = [self.settings_for(request.args[1]) for request in requests]
        for index in sorted(range(len(requests)), key=lambda index: len(encoded[index])):
            groups[settings[index].max_new_tokens, settings[index].temperature].append(index)
        responses = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank > 0, desc="decoding") as bar:
            for indices in groups.values():
                config = settings[indices[0]]
                waiting = [Request(encoded[index], config.max_new_tokens, config.seed) for index in indices]
                budget = self.batch_size * max(len(request.prompt) + request.length for request in waiting)
                for number, completion in Engine(self.family, config, EngineConfig(budget)).run(waiting):
                    index = indices[number]
                    text = decode_response(self.family, completion.token_ids)
                    responses[index] = cut(text, requests[index].args[1].get("until"))
                    self.cache_hook.add_partial("generate_until", requests[index].args, responses[index])
                    bar.update()
        return responses

    def settings_for(self, asked: dict[str, Any]) -> SamplerConfig:
        """The sampler of one request."""
        length = self.sampler.max_new_tokens or asked.get("max_gen_toks") or response_length(self.family, self.sampler)
        temperature = asked.get("temperature", 1.0) if asked.get("do_sample") else self.sampler.temperature
        return replace(self.sampler, max_new_tokens=int(length), temperature=float(temperature))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results = []
        for pair, context, continuation in tqdm(requests, disable=disable_tqdm or self.rank > 0, desc="likelihood"):
            results.append(self.log_likelihood(context[-(self.max_length or 0) :], continuation))
            self.cache_hook.add_partial("loglikelihood", pair, results[-1])
        return results

    def log_likelihood(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """Nats, and whether the sampler would give this continuation without temperature."""
        along, is_greedy = 0.0, False
        if self.likelihood == "trajectory" or self.check_greedy:
            along, is_greedy = trajectory_log_likelihood(self.family, context, continuation, self.sampler)
        if self.likelihood == "trajectory":
            return along, is_greedy
        bound = nelbo_log_likelihood(
            self.family, context, continuation, self.nelbo_samples, self.sampler.seed, self.batch_size
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
