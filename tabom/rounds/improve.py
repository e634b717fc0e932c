"""`tabom improve`: rounds of decoding with the current weights, judging, and training on the responses.

With the objective `policy` a round learns from its right and wrong responses (TraceRL, arXiv 2509.06949); with any
other one it learns from the right ones alone, which is expert iteration. The model stays in memory throughout: its
training and its decoding use the same weights. Optimizer and schedule begin anew in every round.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule

from tabom.data.prompts import PromptSet
from tabom.evaluation.config import EvaluateConfig
from tabom.evaluation.evaluate import Cell, evaluate
from tabom.models.diffusion_model import DiffusionModel, describe
from tabom.rounds.config import ImproveConfig
from tabom.rounds.records import (
    Record,
    check_run,
    finish_round,
    finished_rounds,
    read_rollouts,
    right_shares,
    rollout_figures,
    round_folder,
)
from tabom.sampling.collect import check_samples, collect
from tabom.sampling.config import CollectConfig, EngineConfig, SamplerConfig
from tabom.training.trainer import TabomTrainer

LOGGED = ("loss", "policy", "cross_entropy", "rank", "ratio", "clip_share", "kl", "entropy", "grad_norm")
"""Figures of the training's log whose means over a round are kept."""


@dataclass(frozen=True)
class Improvement:
    """Everything that a round needs.

    Args:
        trainer: without data; its model improves, its `output_dir` is that of the run.
        sampler: of the responses, at a temperature above 0.
        eval_prompts: on which accuracy and pass@k are measured; None: nothing is.
        eval_sampler: of the accuracy; greedy by default.
    """

    trainer: TabomTrainer
    prompts: PromptSet
    config: ImproveConfig
    sampler: SamplerConfig
    engine: EngineConfig | None = None
    eval_prompts: PromptSet | None = None
    eval_sampler: SamplerConfig | None = None

    def run(self) -> list[Record]:
        """Makes the rounds that are not finished; returns the figures of all.

        Round 0 is the base, which is evaluated only. Under torchrun or accelerate the processes share the responses.

        Raises:
            ValueError: the folder was begun with other settings, the sampler is greedy, or DeepSpeed is set up.
        """
        check_samples(self.config.samples_per_prompt, self.sampler)
        trainer, output_dir = self.trainer, self.trainer.args.output_dir
        if trainer.is_deepspeed_enabled:
            raise ValueError(
                "deepspeed: a model that it has sharded does not decode, because its processes decode responses of "
                "their own; start with FSDP2 or DDP"
            )
        if trainer.is_world_process_zero():
            check_run(output_dir, self.settings())
        seed = trainer.args.seed
        for number in range(len(finished_rounds(output_dir)), self.config.rounds + 1):
            trainer.accelerator.wait_for_everyone()
            figures = self.make_round(number, seed) if number else {}
            if number % self.config.eval_every == 0 or number == self.config.rounds:
                figures |= self.evaluate(number)
            if trainer.is_world_process_zero():
                finish_round(output_dir, number, {"round": number, **figures})
                print(f"round {number}: {in_short(figures)}", flush=True)
        trainer.accelerator.wait_for_everyone()
        return finished_rounds(output_dir)

    def settings(self) -> Record:
        """All that decides the rounds, except how many there are."""
        own = asdict(self.config)
        del own["rounds"], own["sampler"]
        chosen = {f"sampler.{name}": value for name, value in asdict(self.sampler).items()}
        training = self.trainer.args.run_settings(self.trainer.accelerator.num_processes)
        return {"prompts": self.prompts.fingerprint(), **own, **chosen, **training}

    @contextmanager
    def model(self) -> Iterator[DiffusionModel]:
        """The model with its current weights, ready to decode in the precision of its training.

        Weights that FSDP2 has sharded are whole meanwhile.
        """
        model = self.trainer.accelerator.unwrap_model(self.trainer.model).eval()
        model.to(self.trainer.args.device)  # with FSDP it stays on the CPU until the first training
        with self.trainer.accelerator.autocast(), whole_weights(model):
            yield describe(model, self.trainer.processing_class)

    def make_round(self, number: int, seed: int) -> Record:
        """Decodes, judges and trains; returns the figures of the round."""
        trainer, folder = self.trainer, round_folder(self.trainer.args.output_dir, number)
        chosen = self.draw_prompts(number, seed)
        answers = [self.prompts.answers[i] for i in chosen]
        prompts = replace(self.prompts, prompts=[self.prompts.prompts[i] for i in chosen], answers=answers)
        samples = self.config.samples_per_prompt
        sampler = replace(self.sampler, seed=self.sampler.seed + (number - 1) * samples)
        folder.mkdir(parents=True, exist_ok=True)
        rollouts = CollectConfig(str(folder / "rollouts.jsonl"), samples, peer_timeout=trainer.args.peer_timeout)
        with self.model() as model:
            collect(model, prompts, sampler, rollouts, self.engine)
        trainer.accelerator.wait_for_everyone()  # the first process has then put the responses of all together

        rollouts = read_rollouts(folder)
        shares = right_shares(rollouts, chosen)
        learnt = self.to_learn_from(rollouts, shares)
        figures = rollout_figures(rollouts, shares) | {"learnt": len(learnt), "right_shares": shares}
        if learnt:
            figures |= mean_figures(trainer.train_on(learnt, str(folder), seed + number))
        trainer.save_model(str(folder / "model"))
        return figures

    def draw_prompts(self, number: int, seed: int) -> list[int]:
        """The indices of the prompts of a round, in rising order."""
        total = len(self.prompts.prompts)
        drawn = self.config.prompts_per_round or total
        if drawn >= total:
            return list(range(total))
        latest: dict[str, float] = {}
        for figures in finished_rounds(self.trainer.args.output_dir):
            latest |= figures.get("right_shares", {})
        weights = np.array([self.config.settled_weight if latest.get(str(i)) in (0, 1) else 1.0 for i in range(total)])
        rng = np.random.default_rng((seed, number))
        return sorted(rng.choice(total, drawn, replace=False, p=weights / weights.sum()).tolist())

    def to_learn_from(self, rollouts: Sequence[Record], shares: Mapping[int, float]) -> list[Record]:
        """The responses that a round is trained on; none if they would give no gradient."""
        if self.trainer.args.objective != "policy":
            return [record for record in rollouts if record["reward"] == 1]
        if all(share in (0, 1) for share in shares.values()):
            return []
        return [record for record in rollouts if record["reward"] is not None]

    def evaluate(self, number: int) -> Record:
        """Accuracy and pass@k on `eval_prompts`, each with its standard error over the problems."""
        if self.eval_prompts is None:
            return {}
        folder = str(round_folder(self.trainer.args.output_dir, number) / "evaluation")
        samplers = {"greedy": (self.eval_sampler or replace(self.sampler, temperature=0.0, top_k=None, top_p=None), 1)}
        if self.config.eval_samples > 1:
            samplers["sampled"] = (self.sampler, self.config.eval_samples)
        found = {}
        for name, (sampler, samples) in samplers.items():
            cell = Cell(f"round {number}", self.eval_prompts.name, name)
            config = EvaluateConfig(folder, samples, peer_timeout=self.trainer.args.peer_timeout)
            with self.model() as model:
                result = evaluate(model, self.eval_prompts, sampler, config, cell, self.engine)
            if result is not None and name == "greedy":
                found["accuracy"] = result["accuracy"]
            elif result is not None:
                found["pass_at"] = {k: result["pass_at"][k] for k in map(str, powers_of_two(samples))}
        return found


@contextmanager
def whole_weights(model: torch.nn.Module) -> Iterator[None]:
    """Puts together the weights that FSDP2 has sharded, and keeps them so.

    A sharded model runs on all processes at the same time, and processes that decode responses of their own do not.
    """
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False)
        module.unshard()
    yield
    for module in sharded:
        module.set_reshard_after_forward(True)
        module.reshard()


def powers_of_two(largest: int) -> list[int]:
    """1, 2, 4, ... up to `largest`, which is the last one in any case."""
    return sorted({2**i for i in range(largest.bit_length())} | {largest})


def mean_figures(log_history: Sequence[Mapping[str, Any]]) -> Record:
    """The means of the logged figures of a training, and its number of optimizer steps."""
    logs = [entry for entry in log_history if "loss" in entry]
    means = {name: float(np.mean([entry[name] for entry in logs])) for name in LOGGED if logs and name in logs[-1]}
    return {"steps": log_history[-1]["step"] if log_history else 0, **means}


def in_short(figures: Mapping[str, Any]) -> str:
    """The most important figures of a round in one line."""
    parts = []
    if figures.get("reward") is not None:
        settled = figures["always_right"] + figures["always_wrong"]
        parts.append(f"{figures['reward']:.1%} of {figures['responses']} responses right, {settled} prompts settled")
    if "accuracy" in figures and figures["accuracy"]["mean"] is not None:
        parts.append(f"accuracy {figures['accuracy']['mean']:.1%}")
    for k, estimated in figures.get("pass_at", {}).items():
        if estimated["mean"] is not None and k != "1":
            parts.append(f"pass@{k} {estimated['mean']:.1%}")
    return ", ".join(parts) or "begun"
