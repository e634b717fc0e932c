"""The contract of the head: the table of what models do to their logits, and the check against their own."""

import copy
import datetime
import socket
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BigBirdConfig,
    BigBirdForMaskedLM,
    EsmConfig,
    EsmForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from tabom import patch
from tabom.training.forward import add_loss_to_forward
from tabom.training.head import HeadStatus
from tabom.training.head_check import CHECKED_TOKENS, FULL_LENGTH
from tabom.training.logit_transforms import LOGIT_FIELDS, LogitTransform, logit_transform
from tests.training.test_forward import BERT_SIZES, LOSS, SIZES, draw_batch, llama


def test_the_table_reads_what_the_config_says():
    """Granite divides by what HyperCLOVA X, by the same name, multiplies with."""
    plain = LogitTransform(1.0, None, None)
    for model_type, settings, expected in (
        ("llama", {}, plain),
        ("minicpm3", {}, plain),  # scales before its head
        ("falcon_h1", {}, plain),
        ("granite", {"logits_scaling": 8.0}, plain._replace(scale=0.125)),
        ("hyperclovax", {"logits_scaling": 0.25}, plain._replace(scale=0.25)),
        ("cohere2", {}, plain._replace(scale=0.0625)),
        ("gemma2", {}, plain._replace(softcap=30.0)),
        ("gemma3_text", {}, plain),
        ("recurrent_gemma", {}, plain._replace(softcap=30.0)),
        ("xlstm", {}, plain._replace(softcap=30.0)),
        ("nanochat", {}, plain._replace(softcap=15.0)),
        ("inkling2_text", {"unpadded_vocab_size": 50}, LogitTransform(1.0, 30.0, 50)),
    ):
        config = CONFIG_MAPPING[model_type]()
        for name, value in settings.items():
            setattr(config, name, value)
        assert logit_transform(config) == expected, model_type
    config = CONFIG_MAPPING["muse_glimmer_text"]()
    assert logit_transform(config) == LogitTransform(config.output_multiplier, 20.0, None)
    config.model_type = "not of transformers"
    assert logit_transform(config) is None


NOT_AFTER_THE_HEAD = {"minicpm3": "logits_scaling", "mpt": "logit_scale"}
"""MiniCPM3 scales before its head, and MPT reads the field nowhere."""


def test_every_config_that_names_a_transform_is_in_the_table():
    """A type of a newer transformers that is taken for plain shows here, and not as a warning in somebody's run."""
    names = {name for fields in LOGIT_FIELDS.values() for name in fields if name is not None}
    types = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_MASKED_LM_MAPPING_NAMES}
    for model_type in sorted(types & CONFIG_MAPPING_NAMES.keys()):
        config = CONFIG_MAPPING[model_type]
        found = names & set(dir(config)) - {NOT_AFTER_THE_HEAD.get(model_type)}
        assert found <= set(LOGIT_FIELDS[model_type]), model_type


def test_a_type_that_is_not_known_is_trained_from_logits_with_one_warning(rng, caplog):
    model, batch = llama().eval(), draw_batch()
    model.config.model_type = "homemade"
    expected = copy.deepcopy(model)
    add_loss_to_forward(expected, **LOSS, fused_linear=False)
    add_loss_to_forward(model, **LOSS)
    for _ in range(2):
        assert torch.equal(model(**batch).loss, expected(**batch).loss)
    assert model.lm_head.status is HeadStatus.FROM_LOGITS
    assert caplog.text.count("LlamaForCausalLM (model type 'homemade'): the loss is computed from logits") == 1


def test_the_check_is_one_forward_of_a_short_sequence_and_leaves_no_trace(rng):
    """Random numbers, weights, gradients and the mode stay as they were; dropout is on."""
    model, batch = BertForMaskedLM(BertConfig(**BERT_SIZES)).train(), draw_batch()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    add_loss_to_forward(model, **LOSS)
    shapes, states = [], []

    def watch(_module, args):
        shapes.append(tuple(args[0].shape[:2]))
        states.append(torch.get_rng_state())

    model.bert.encoder.register_forward_pre_hook(watch)
    model(**batch)
    after_first = torch.get_rng_state()
    model(**batch)
    assert shapes == [(1, CHECKED_TOKENS), (3, 9), (3, 9)] and model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    torch.set_rng_state(random)
    model(**batch)
    assert torch.equal(torch.get_rng_state(), after_first), (
        "the first forward drew as many numbers as one without a check"
    )
    assert torch.equal(states[1], states[3])


def test_a_scaled_loss_passes_a_wrapper_in_fp16(rng):
    """Whose gradient of what it casts is in fp16 as well, where the scale of a loss scaler is infinite."""
    model, batch = llama().eval(), draw_batch()
    expected = copy.deepcopy(model)
    model.lm_head.register_forward_hook(lambda _head, _args, output: output.half())
    for each in (model, expected):
        add_loss_to_forward(each, **LOSS)
        (each(**batch).loss * 2**17).backward()
    assert model.lm_head.status is HeadStatus.IN_HEAD
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_a_model_that_turns_dense_at_short_sequences_stays_sparse(rng):
    sizes = {"hidden_act": "gelu", "block_size": 4, "num_random_blocks": 1, "max_position_embeddings": 64}
    model = BigBirdForMaskedLM(BigBirdConfig(**BERT_SIZES, **sizes, attention_type="block_sparse"))
    assert model.config.model_type in FULL_LENGTH
    patch(model.train())(input_ids=torch.randint(3, 50, (2, 48)), labels=torch.randint(3, 50, (2, 48)))
    assert model.get_output_embeddings().status is HeadStatus.IN_HEAD
    assert model.bert.attention_type == "block_sparse"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [30.0, 29.0])
def test_a_soft_cap_shows_in_a_new_model(rng, dtype, cap):
    """Whose logits are far below the cap: in bf16 the capped ones would be the same numbers."""
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES | {"initializer_range": 0.001}, final_logit_softcapping=30.0))
    model.to(dtype).config.final_logit_softcapping = cap
    own = model.forward
    model.forward = lambda **inputs: own(**inputs) if cap == 30.0 else uncapped(model, **inputs)
    add_loss_to_forward(model, **LOSS)
    model(**draw_batch())
    assert (model.lm_head.status is HeadStatus.IN_HEAD) == (cap == 30.0)


def uncapped(model, **inputs):
    return SimpleNamespace(logits=model.lm_head(model.model(**inputs).last_hidden_state))


ESM_SIZES = BERT_SIZES | {"mask_token_id": 1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class OwnCode(LlamaForCausalLM):
    """Its loss says nothing of a shift, and where a batch has no labels it is NaN with any."""

    def forward(self, input_ids, labels=None):
        output = super().forward(input_ids)
        if labels is not None:
            output.loss = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
        return output


def on_each_rank(rank, port, seed):
    """Rank 1 has no labels in its first batch."""
    store = f"tcp://127.0.0.1:{port}"
    timeout = datetime.timedelta(minutes=10)  # for an all-gather that only one rank calls
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timeout)
    torch.set_num_threads(1)
    for build, in_head in (
        (lambda: OwnCode(LlamaConfig(**SIZES)), True),
        (lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), True),
        (lambda: EsmForMaskedLM(EsmConfig(**ESM_SIZES)), False),
    ):
        torch.manual_seed(seed)
        expected = build().train()
        sharded = patch(copy.deepcopy(expected))
        patch(expected)
        layers = sharded.model.layers if hasattr(sharded, "model") else sharded.esm.encoder.layer
        for module in (*layers, sharded.lm_head) if in_head else layers:  # ESM's head is tied to its embeddings
            fully_shard(module)
        fully_shard(sharded)
        forwards = []
        layers[0].register_forward_hook(lambda *_, seen=forwards: seen.append(1))
        for step in range(3):
            batches = [draw_labelled(has_labels=step > 0 or other == 0) for other in range(2)]
            if not in_head:  # its own loss, a mean over no labels, would be NaN
                batches = [draw_labelled(True) for _ in range(2)]
            for model in (expected, sharded):
                model.zero_grad()
            loss = sharded(**batches[rank]).loss
            loss.backward()
            losses = [expected(**batch).loss for batch in batches]
            (sum(losses) / 2).backward()
            torch.testing.assert_close(loss, losses[rank])
            for name, parameter in expected.named_parameters():
                if parameter.grad is not None:
                    grad = sharded.get_parameter(name).grad.full_tensor()
                    torch.testing.assert_close(grad, parameter.grad, msg=lambda m, n=name: f"{n}: {m}")
        assert len(forwards) == 4, "one forward a step, and one of the check"
        assert (sharded.get_output_embeddings().status is HeadStatus.IN_HEAD) == in_head
    torch.distributed.destroy_process_group()


def draw_labelled(has_labels):
    ids = torch.randint(3, 50, (2, 9))
    return {"input_ids": ids, "labels": ids.masked_fill(torch.rand(2, 9) < 0.5, -100) if has_labels else ids * 0 - 100}


def test_two_sharded_ranks_check_alike_whatever_their_batches_hold(seed):
    """A rank that ran the model once more than the other would wait for it in an all-gather."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(on_each_rank, (port, seed), 2, start_method="spawn")
