import copy
import dataclasses
from types import SimpleNamespace

import peft
import pytest
import torch
import torch.nn.functional as F
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    CohereConfig,
    CohereForCausalLM,
    EsmConfig,
    EsmForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    Inkling2ForCausalLM,
    Inkling2TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MiniCPM3Config,
    MiniCPM3ForCausalLM,
    MobileBertConfig,
    MobileBertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ProphetNetConfig,
    ProphetNetForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutput

from tabom.training import forward as forward_module
from tabom.training.forward import add_loss_to_forward
from tabom.training.head import HeadLoss, HeadWithLoss, loss_in_head
from tabom_kernels import fused_linear_cross_entropy, softmax_entropy, tabom_loss

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "is_causal": False,
    "initializer_range": 0.3,
}
BERT_SIZES = {name: SIZES[name] for name in SIZES if name not in ("num_key_value_heads", "head_dim", "is_causal")}
LOSS = {"rank_weight": 0.5, "margin": 0.2, "form": "hinge"}


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**SIZES | changes))


def llama_with_bias():
    model = llama()
    model.lm_head = torch.nn.Linear(16, 50)
    return model


def inkling2():
    """Soft-caps, then cuts off what pads its vocabulary."""
    swa = {f"swa_{name}": SIZES[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")}
    experts = {"moe_intermediate_size": 32, "n_routed_experts": 2, "num_experts_per_tok": 1}
    sizes = SIZES | swa | experts | {"vocab_size": 53, "unpadded_vocab_size": 50}
    return Inkling2ForCausalLM(Inkling2TextConfig(**sizes, final_logit_softcapping=3.0))


def bart():
    """Adds a bias, `final_logits_bias`, that is zero in every checkpoint."""
    sizes = {"d_model": 16, "vocab_size": 50, "pad_token_id": 0, "forced_eos_token_id": None, "init_std": 0.3}
    sizes |= {
        f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads", "ffn_dim")
    }
    return BartForConditionalGeneration(BartConfig(**sizes))


MODELS = {
    "untied": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "bias": llama_with_bias,
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "bart": bart,
    "bert": lambda: BertForMaskedLM(BertConfig(**BERT_SIZES)),
    "modernbert": lambda: ModernBertForMaskedLM(
        ModernBertConfig(**BERT_SIZES, global_attn_every_n_layers=1, cls_token_id=1, sep_token_id=2, eos_token_id=2)
    ),
}
CHANGED_LOGITS = {
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=3.0)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, final_logit_softcapping=5.0)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.3)),
    "minicpm3": lambda: MiniCPM3ForCausalLM(
        MiniCPM3Config(**SIZES, dim_model_base=4, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8)
    ),
    "inkling2": inkling2,
}


SHARDED = "gemma2", "granite", "cohere"


def draw_batch(shift=0):
    """Three sequences of 9 tokens; the loss needs six positions of each, moved `shift` to the left."""
    positions = torch.stack([torch.randperm(8)[:6] + 1 for _ in range(3)])
    rows = (torch.arange(3)[:, None] * 9 + positions - shift).flatten()
    return {
        "input_ids": torch.randint(3, 50, (3, 9)),
        "attention_mask": torch.ones(3, 9, dtype=torch.int64),
        "rows": rows,
        "labels": torch.randint(50, (18,)).masked_fill(torch.rand(18) < 0.3, -100),
        "steps": torch.randint(-1, 5, (18,)),
        "cu_seqlens": torch.tensor([0, 6, 12, 18], dtype=torch.int32),
    }


def expected_of(model, batch):
    """Loss, gradients and entropies from all the logits of the model's own forward."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)
    logits = logits[batch["rows"]]
    result = tabom_loss(logits, batch["labels"], batch["steps"], batch["cu_seqlens"], **LOSS, backend="reference")
    return result, gradients(model, result.loss), softmax_entropy(logits.detach())


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_training(model, batch, **options):
    expected, expected_grads, entropy = expected_of(model, batch)
    add_loss_to_forward(model, **LOSS, **options)
    output = model(**batch, return_entropy=True)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.cross_entropy, expected.cross_entropy)
    torch.testing.assert_close(output.rank, expected.rank)
    torch.testing.assert_close(output.entropy, entropy)
    grads = gradients(model, output.loss)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], msg=lambda m, n=name: f"{n}: {m}")
    assert model(**batch).entropy is None


@pytest.mark.parametrize("build", [*MODELS.values(), *CHANGED_LOGITS.values()], ids=[*MODELS, *CHANGED_LOGITS])
@pytest.mark.parametrize("shift", [0, 1])
def test_the_fused_head_trains_any_model_as_its_logits_would(rng, monkeypatch, build, shift):
    monkeypatch.setattr(forward_module, "logits_at", None)  # the logits are never asked for
    assert_same_training(build().eval(), draw_batch(shift))


@pytest.mark.parametrize("build", [*MODELS.values(), *CHANGED_LOGITS.values()], ids=[*MODELS, *CHANGED_LOGITS])
def test_the_logits_of_the_rows_do_for_every_model(rng, build):
    assert_same_training(build().eval(), draw_batch(), fused_linear=False)


def rescaled():
    model = CHANGED_LOGITS["cohere"]()
    model.logit_scale = 0.31
    return model


def biased():
    model = bart()
    model.final_logits_bias[0, 7] = 0.5
    return model


def moved():
    return changed(lambda logits: logits + 0.5)


def cut():
    return changed(lambda logits: logits[..., :-3])


def changed(change):
    model = llama()
    plain = model.forward
    model.forward = lambda **inputs: SimpleNamespace(logits=change(plain(**inputs).logits))
    return model


@pytest.mark.parametrize("build", [rescaled, biased, moved, cut])
def test_what_the_config_does_not_say_is_seen_and_the_loss_is_that_of_the_logits(rng, build, caplog):
    """A scale that is not the config's; logits that are moved, one of them, all of them; fewer logits."""
    assert_falls_back(build, caplog, "the model changes its logits after the head, and not as its config says")


def assert_falls_back(build, caplog, reason):
    model, batch = build().eval(), draw_batch()
    batch["labels"].clamp_(max=40)  # the last logits may be cut off
    add_loss_to_forward(model, **LOSS)
    caplog.clear()
    losses = [model(**batch).loss.item() for _ in range(2)]
    assert caplog.text.count(f"the loss is computed from logits, and not in the head: {reason}") == 1
    plain = build().eval()
    plain.load_state_dict(model.state_dict())
    add_loss_to_forward(plain, **LOSS, fused_linear=False)
    assert losses == [plain(**batch).loss.item()] * 2
    del batch["rows"], batch["labels"], batch["steps"], batch["cu_seqlens"]
    assert model(**batch).logits.shape[:2] == (3, 9), "the head is itself again"


def mobilebert():
    """Multiplies with weights of its own beside those of its output embeddings, which it does not call."""
    config = MobileBertConfig(**BERT_SIZES, embedding_size=8, num_feedforward_networks=1)
    return MobileBertForMaskedLM(config).double()  # its gradients are not stable in fp32


def prophetnet():
    """Predicts two tokens at each position."""
    sizes = {f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")}
    sizes |= {f"num_{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    return ProphetNetForCausalLM(ProphetNetConfig(**sizes, vocab_size=50, hidden_size=16, init_std=0.3))


@pytest.mark.parametrize("build", [mobilebert, prophetnet])
def test_a_head_without_one_hidden_state_a_position_gives_logits(rng, build, caplog):
    assert_same_training(build().eval(), draw_batch())
    assert_falls_back(build, caplog, "its output embeddings are not called once with one hidden state a position")


def test_a_bias_that_is_trained_after_the_head_is_seen_while_it_is_still_zero(rng, caplog):
    """Also where the first batch is one of an evaluation, which makes no graph."""
    model, batch = EsmForMaskedLM(EsmConfig(**BERT_SIZES, mask_token_id=1)).eval(), draw_batch()
    assert not model.lm_head.bias.any() and model.get_output_embeddings().bias is None
    assert_same_training(copy.deepcopy(model), batch)
    caplog.clear()
    add_loss_to_forward(model, **LOSS)
    with torch.inference_mode():
        model(**batch)
    assert caplog.text.count("by parameters that are trained") == 1
    model(**batch).loss.backward()
    assert model.lm_head.bias.grad.any()


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]], ids=["body", "head"])
def test_lora_on_the_body_or_on_the_head(rng, targets):
    torch.manual_seed(rng.randrange(2**31))
    model, batch = llama().eval(), draw_batch()
    lora = peft.LoraConfig(target_modules=targets, r=4, init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora)
    expected, expected_grads, _ = expected_of(adapted, batch)
    add_loss_to_forward(model, **LOSS)
    output = adapted(**batch)
    torch.testing.assert_close(output.loss, expected.loss)
    grads = gradients(adapted, output.loss)
    assert grads.keys() == expected_grads.keys() and all("lora" in name for name in grads)
    assert any("lm_head" in name for name in grads) == ("lm_head" in targets)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], msg=lambda m, n=name: f"{n}: {m}")


def test_a_frozen_head_gets_no_gradient(rng):
    model, batch = llama().eval(), draw_batch()
    model.lm_head.requires_grad_(False)
    add_loss_to_forward(model, **LOSS)
    assert "lm_head.weight" not in gradients(model, model(**batch).loss)


def test_a_head_whose_forward_was_replaced_keeps_it(rng):
    """As accelerate does to offload a layer."""
    model, batch = llama().eval(), draw_batch()
    plain = model.lm_head.forward
    model.lm_head.forward = lambda hidden: plain(hidden) * 2
    assert_same_training(model, batch)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("build", [llama, MODELS["tied"], MODELS["bias"], *map(CHANGED_LOGITS.get, SHARDED)])
def test_sharded_in_bf16_the_loss_stays_in_fp32(rng, one_process, build):
    """FSDP2 casts what the head and the model return."""
    model, batch = build().eval(), draw_batch()
    expected = copy.deepcopy(model)
    for parameter in expected.parameters():
        parameter.data = parameter.data.bfloat16()
    add_loss_to_forward(expected, **LOSS)
    add_loss_to_forward(model, **LOSS)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    for modules in (*model.model.layers, [model.get_input_embeddings(), model.get_output_embeddings()]):
        fully_shard(modules, mp_policy=policy)
    fully_shard(model, mp_policy=dataclasses.replace(policy, output_dtype=None))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    loss, expected_loss = model(**batch).loss, expected(**batch).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    grads, expected_grads = gradients(model, loss), gradients(expected, expected_loss)
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name].full_tensor().bfloat16(), grad, msg=lambda m, n=name: f"{n}: {m}")


def test_a_compiled_loss_can_be_scaled_in_place(rng, monkeypatch):
    """As transformers.Trainer does; inductor gives an input back as it is."""
    # A cache knows an op by its name alone, and may hold what was compiled of another state of its code.
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    model, labels = llama(), torch.randint(50, (3 * 9,))
    model.lm_head.__class__ = HeadWithLoss
    hidden = torch.randn(3, 9, 16, requires_grad=True)

    @torch.compile(options={"cpp_cache_precompile_headers": False})  # which take longer than they save once
    def compiled(hidden):
        def loss_of_hidden(hidden, weight, bias):
            return HeadLoss(fused_linear_cross_entropy(hidden, weight, labels, bias=bias))

        def forward(hidden):
            return CausalLMOutput(logits=model.lm_head(hidden))

        return loss_in_head(model, loss_of_hidden, forward, {"hidden": hidden})[0].loss

    loss = compiled(hidden)
    loss *= 2
    loss.backward()
    expected = 2 * F.cross_entropy(model.lm_head(hidden).flatten(0, 1), labels)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(hidden.grad, torch.autograd.grad(expected, hidden)[0])
