"""transformers shards a model by its tp_plan, and the loss is computed from slices of the vocabulary."""

import os
import socket

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

from tabom import TabomConfig, TabomTrainer
from tabom.lab.model import character_tokenizer
from tabom.training.forward import add_loss_to_forward
from tests.training.test_forward import LOSS, draw_batch, llama

STEPS = 3


def train(model, batch):
    """The losses of a few steps, the gradients of the last, and logits without a loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return torch.stack(losses), gradients, model(**inputs).logits


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_each_rank(rank, folder, port, seed):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    for name, is_fused in (("untied", True), ("tied", True), ("untied", False)):
        one = LlamaForCausalLM.from_pretrained(folder / name, dtype=torch.float64)
        sharded = LlamaForCausalLM.from_pretrained(folder / name, dtype=torch.float64, tp_plan="auto")
        assert sharded.lm_head.weight.to_local().shape[0] == (26, 25)[rank], "51 columns do not share out evenly"
        for model in (one, sharded):
            add_loss_to_forward(model, **LOSS, fused_linear=is_fused)
        torch.manual_seed(seed)
        batch = draw_batch()
        gathered = []
        sharded.lm_head.register_forward_hook(lambda _, __, out, seen=gathered: seen.append(out.numel() > 51))
        expected, got = train(one, batch), train(sharded, batch)
        check = [True] * is_fused
        assert gathered == [*check, *[not is_fused] * STEPS, True], (
            "logits are gathered for the check and without a loss"
        )
        torch.testing.assert_close(got[0], expected[0])
        torch.testing.assert_close(got[2], expected[2], rtol=1e-6, atol=1e-8)
        assert got[1].keys() == expected[1].keys()
        for key, gradient in expected[1].items():
            torch.testing.assert_close(
                whole(got[1][key]), gradient, rtol=1e-6, atol=1e-8, msg=lambda m, k=key: f"{k}: {m}"
            )
    with pytest.raises(ValueError, match="tp_plan"):
        TabomTrainer(sharded, TabomConfig(folder, report_to="none"), processing_class=character_tokenizer())
    torch.distributed.destroy_process_group()


def test_a_model_sharded_by_its_plan_trains_as_a_whole_one(seed, tmp_path):
    torch.manual_seed(seed)
    for name in ("untied", "tied"):
        llama(vocab_size=51, tie_word_embeddings=name == "tied").save_pretrained(tmp_path / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(on_each_rank, (tmp_path, port, seed), 2, start_method="spawn")
