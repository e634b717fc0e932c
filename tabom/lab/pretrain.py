"""Pre-trains the lab's base model from nothing: `tabom lab pretrain`.

Masked diffusion (LLaDA's recipe): every response token is masked with one probability t ~ U(0, 1) a sequence and
predicted from the rest. Matrices learn by Muon, everything else by AdamW. Subtraction is seen rarely on purpose:
it is the weak task that post-training is to improve.

With a block size the model is block-causal, and one forward trains all blocks (`tabom.models.layout`): a noisy copy
of the response stands beside the clean text. As in SDAR's recipe, all blocks of a sequence have the same t.
"""

from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, get_cosine_schedule_with_warmup, set_seed

from tabom.lab.config import PretrainConfig
from tabom.lab.model import character_tokenizer, tiny_model
from tabom.lab.tasks import Addition, Problem, Reversing, Sorting, Subtraction, Sudoku, Task
from tabom.models.diffusion_model import LogitRows
from tabom.models.layout import forward_of_blocks, lay_out
from tabom.models.writing import naming_full_disk

MIXTURE: dict[Task, int] = {
    Addition(): 45,
    Subtraction(): 4,
    Sorting(): 22,
    Reversing(): 22,
    Sudoku(givens=12): 12,
    Sudoku(givens=9): 12,
    Sudoku(givens=6): 11,
}
"""The number of sequences of each task in a batch: 128 in all, of which 3% are subtractions."""


def encode(
    tokenizer: PreTrainedTokenizerBase, problems: list[Problem], block_size: int | None = None
) -> tuple[Tensor, int]:
    """(B, L) token ids of problems of one task, and the length of their prompts.

    With a block size the answers are filled up to whole blocks with end tokens, because the model decodes whole blocks.
    """
    prompt_length, length = len(problems[0].prompt), len(problems[0].prompt + problems[0].answer)
    end = tokenizer.eos_token * (-length % (block_size or 1))
    texts = [problem.prompt + problem.answer + end for problem in problems]
    return tokenizer(texts, return_tensors="pt").input_ids, prompt_length


def masked_diffusion_loss(model: LlamaForCausalLM, input_ids: Tensor, prompt_length: int) -> Tensor:
    """Summed cross-entropy (nats) of the masked response tokens, weighted 1/t: the NELBO of LLaDA, section 2."""
    response = input_ids[:, prompt_length:]
    # Stratified t: as uniform as U(0, 1), with less variance from batch to batch.
    t = ((torch.randperm(len(response)) + torch.rand(len(response))) / len(response)).clamp(min=0.05)[:, None]
    masked = torch.rand(response.shape) < t
    logits = response_logits(model, input_ids, prompt_length, masked)
    return (F.cross_entropy(logits[masked], response[masked], reduction="none") / t.expand_as(masked)[masked]).sum()


def response_logits(model: LlamaForCausalLM, input_ids: Tensor, prompt_length: int, masked: Tensor) -> Tensor:
    """(B, T, V) logits of the response tokens, which see the mask token where `masked` (B, T) is True."""
    prompt, response = input_ids.split([prompt_length, input_ids.shape[1] - prompt_length], dim=1)
    mask_token_id, block_size = model.config.mask_token_id, getattr(model.config, "block_size", None)
    if block_size is None:
        noisy = torch.cat([prompt, response.masked_fill(masked, mask_token_id)], dim=1)
        return model(input_ids=noisy).logits[:, prompt_length:]
    layouts = [
        lay_out(*texts, mask_token_id, LogitRows(), block_size)
        for texts in zip(prompt.tolist(), response.tolist(), strict=True)
    ]
    inputs = {
        name: torch.from_numpy(np.stack([layout.inputs[name] for layout in layouts])) for name in layouts[0].inputs
    }
    rows = layouts[0].token_rows
    inputs["input_ids"][:, rows] = inputs["input_ids"][:, rows].masked_fill(masked, mask_token_id)
    logits = forward_of_blocks(model, model.forward, block_size, **inputs).logits
    return logits[:, layouts[0].logit_rows]  # the same rows for all, because a task's texts have one length


def make_optimizers(model: LlamaForCausalLM, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings, head and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    is_matrix = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in is_matrix]
    return [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def pretrain(config: PretrainConfig) -> Path:
    """Trains the base model and saves model and tokenizer (bf16) to `config.output_dir`."""
    set_seed(config.seed)
    tokenizer = character_tokenizer()
    model = tiny_model(tokenizer, config.block_size).train()
    optimizers = make_optimizers(model, config.learning_rate)
    schedulers = [get_cosine_schedule_with_warmup(o, config.warmup_steps, config.max_steps) for o in optimizers]
    batch_size = sum(MIXTURE.values())
    streams = {task: task.stream("train", config.seed) for task in MIXTURE}

    with Progress() as progress:
        bar = progress.add_task("pre-training", total=config.max_steps)
        for step in range(1, config.max_steps + 1):
            # One forward pass a task, so that nothing is padded; the gradients add up.
            nelbo = 0.0
            for task, count in MIXTURE.items():
                input_ids, prompt_length = encode(tokenizer, list(islice(streams[task], count)), config.block_size)
                response_length = input_ids.shape[1] - prompt_length
                loss = masked_diffusion_loss(model, input_ids, prompt_length) / response_length / batch_size
                loss.backward()
                nelbo += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            progress.update(bar, advance=1, description=f"pre-training, NELBO {nelbo:.3f} nats a token")
            if step % 250 == 0:
                progress.console.print(f"step {step:5d}  NELBO {nelbo:.3f} nats a token")

    with naming_full_disk(config.output_dir):
        model.to(torch.bfloat16).save_pretrained(config.output_dir)
        tokenizer.save_pretrained(config.output_dir)
    return Path(config.output_dir)
