import copy
import inspect

import peft
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    CohereConfig,
    CohereForCausalLM,
    EsmConfig,
    EsmForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

from tabom import patch, unpatch
from tabom.training.head import HeadWithLoss
from tabom.training.head_check import computes_loss
from tests.training.test_forward import BERT_SIZES, SIZES

CAUSAL = SIZES | {"is_causal": True}
MODELS = {
    "causal": lambda: LlamaForCausalLM(LlamaConfig(**CAUSAL)),
    "soft-capped": lambda: Gemma2ForCausalLM(Gemma2Config(**CAUSAL, final_logit_softcapping=3.0)),
    "scaled": lambda: CohereForCausalLM(CohereConfig(**CAUSAL, logit_scale=0.3)),
    "masked": lambda: BertForMaskedLM(
        BertConfig(**BERT_SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ),
    "experts": lambda: MixtralForCausalLM(
        MixtralConfig(**CAUSAL, num_local_experts=2, output_router_logits=True, router_aux_loss_coef=0.5)
    ),
}


def draw_batch():
    input_ids = torch.randint(3, 50, (2, 9))
    labels = input_ids.masked_fill(torch.rand(2, 9) < 0.3, -100)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


def loss_and_gradients(model, **batch):
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_training(model, patched, batch):
    expected, expected_grads = loss_and_gradients(model, **batch)
    output, grads = loss_and_gradients(patched, **batch)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(grads, expected_grads)
    return output


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_a_patched_model_has_the_loss_of_its_own_and_no_logits(rng, build):
    model, batch = build().train(), draw_batch()
    patched = patch(copy.deepcopy(model))
    output = assert_same_training(model, patched, batch)
    assert output.logits is None and "logits" not in output
    if isinstance(model, BertForMaskedLM):
        return  # its own loss ignores the number of items
    assert_same_training(model, patched, batch | {"num_items_in_batch": torch.tensor(23)})


@pytest.mark.parametrize("build", [MODELS["causal"], MODELS["masked"]], ids=["causal", "masked"])
def test_the_loss_comes_first_as_in_a_tuple(rng, build):
    model, batch = build().train(), draw_batch()
    patched, expected = patch(copy.deepcopy(model)), model(**batch).loss
    torch.testing.assert_close(patched(**batch)[0], expected)
    torch.testing.assert_close(patched(**batch, return_dict=False)[0], expected)


def test_labels_of_another_shape_are_refused(rng):
    patched, batch = patch(MODELS["causal"]().train()), draw_batch()
    batch["labels"] = batch["labels"][:, 1:]
    with pytest.raises(ValueError, match=r"labels: \(2, 8\), and the model has logits of 18 positions"):
        patched(**batch)


@pytest.mark.parametrize("build", [MODELS["causal"], MODELS["masked"]], ids=["causal", "masked"])
def test_without_labels_and_in_evaluation_it_is_what_it_was(rng, build):
    model, batch = build(), draw_batch()
    patched = patch(copy.deepcopy(model))
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    assert torch.equal(patched.train()(**inputs).logits, model.train()(**inputs).logits)
    ours, theirs = patched.eval()(**batch), model.eval()(**batch)
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.loss, theirs.loss)


@pytest.mark.parametrize("build", [MODELS["causal"], MODELS["masked"]], ids=["causal", "masked"])
def test_shifted_labels_and_token_weights(rng, build):
    """Labels that stand where their logits are, as a diffusion model has them; also in evaluation."""
    model, batch = build().train(), draw_batch()
    weights, targets = torch.rand(2, 9), batch.pop("labels")
    logits = model(**batch).logits
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    patched = patch(copy.deepcopy(model))
    options = {"labels": targets, "num_items_in_batch": 7}
    for mode in (True, False):
        patched.train(mode)
        loss = patched(**batch, **options, shift_labels=targets, token_weights=weights).loss
        torch.testing.assert_close(loss, (each * weights.flatten()).sum() / 7)
        torch.testing.assert_close(patched(**batch, **options, shift_labels=targets).loss, each.sum() / 7)
    shift = int(isinstance(model, LlamaForCausalLM))
    moved = F.cross_entropy(logits[:, : 9 - shift].flatten(0, 1), targets[:, shift:].flatten(), reduction="none")
    expected = (moved * weights[:, shift:].flatten()).sum() / 7
    torch.testing.assert_close(patched(**batch, **options, token_weights=weights).loss, expected)


@pytest.mark.parametrize("name", ["shift_labels", "token_weights"])
def test_what_would_have_no_effect_is_refused(rng, name):
    """Without labels there is no loss, and a head that was replaced computes none."""
    patched, batch = patch(MODELS["causal"]()), draw_batch()
    labels = batch.pop("labels")
    extra = {name: labels}
    for mode in (True, False):
        with pytest.raises(ValueError, match=f"{name}: without labels no loss is computed"):
            patched.train(mode)(**batch, **extra)
    patched.set_output_embeddings(torch.nn.Sequential(patched.lm_head))
    with pytest.raises(ValueError, match=f"{name}: the head of this LlamaForCausalLM does not compute the loss"):
        patched(**batch, **extra, labels=labels)


class OwnLoss(LlamaForCausalLM):
    """A loss in code of its own, as models on the hub have it: shifted, or with labels where their logits are."""

    is_shifted, smoothing, is_there = True, 0.0, True

    def forward(self, input_ids, attention_mask=None, labels=None):
        output = super().forward(input_ids, attention_mask=attention_mask)
        if labels is not None and self.is_there:
            logits, targets = output.logits, labels
            if self.is_shifted:
                logits, targets = logits[:, :-1], labels[:, 1:]
            logits = logits.reshape(-1, logits.shape[-1])
            output.loss = F.cross_entropy(logits, targets.reshape(-1), label_smoothing=self.smoothing)
        return output


class ShiftsNot(OwnLoss):
    is_shifted = False


class Smooths(OwnLoss):
    smoothing = 0.1


class HasNoLoss(OwnLoss):
    is_there = False


def bart_decoder(dropout=0.0):
    sizes = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    return BartForCausalLM(BartConfig(**sizes, dropout=dropout, vocab_size=50, init_std=0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "build", [bart_decoder, lambda: OwnLoss(LlamaConfig(**CAUSAL)), lambda: ShiftsNot(LlamaConfig(**CAUSAL))]
)
def test_a_loss_of_the_models_own_code_shows_whether_it_shifts_the_labels(rng, build, dtype):
    """At a new model, whose two losses differ by less than bf16 holds; and of one sequence alone logits are held."""
    model, batch = build().to(dtype).train(), draw_batch()
    patched = patch(copy.deepcopy(model))
    held = []
    patched.lm_head.register_forward_hook(lambda _, __, logits: held.append(logits.shape[:-1].numel()))
    for _ in range(2):
        expected, expected_grads = loss_and_gradients(model, **batch)
        output, grads = loss_and_gradients(patched, **batch)
        rounding = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(output.loss, expected.loss.float(), rtol=rounding, atol=0)
        ours, theirs = (torch.cat([x.float().flatten() for x in found.values()]) for found in (grads, expected_grads))
        assert grads.keys() == expected_grads.keys() and (ours - theirs).norm() <= rounding * theirs.norm()
        assert output.logits is None
    assert held == [16, 1, 1], "whole logits of one short sequence, once"


def test_a_look_at_the_loss_leaves_the_random_numbers_as_they_were(rng):
    model, batch = bart_decoder(dropout=0.5).train(), draw_batch()
    patched = patch(copy.deepcopy(model))
    torch.manual_seed(0)
    expected = model(**batch).loss
    torch.manual_seed(0)
    torch.testing.assert_close(patched(**batch).loss, expected)


def test_a_first_batch_without_labels_decides_as_any_other(rng):
    """Its loss is 0, where the mean over no labels is NaN."""
    model, batch = ShiftsNot(LlamaConfig(**CAUSAL)).train(), draw_batch()
    patched = patch(copy.deepcopy(model))
    unlabelled = batch | {"labels": torch.full_like(batch["labels"], -100)}
    assert model(**unlabelled).loss.isnan()
    output, grads = loss_and_gradients(patched, **unlabelled)
    assert output.loss == 0 and not any(grad.any() for grad in grads.values())
    assert_same_training(model, patched, batch)


def twice(logits, labels, vocab_size, **_):
    return 2 * F.cross_entropy(logits.view(-1, vocab_size), labels.view(-1))


@pytest.mark.parametrize("build", [Smooths, LlamaForCausalLM])
def test_a_loss_that_is_no_cross_entropy_stays(rng, caplog, build):
    """One in code of its own, and one that was put in place of transformers'."""
    model, batch = build(LlamaConfig(**CAUSAL)).train(), draw_batch()
    patched = patch(copy.deepcopy(model))
    for each in (model, patched):
        each.loss_function = twice
    for _ in range(2):
        assert assert_same_training(model, patched, batch).logits is not None
    assert caplog.text.count("its own loss is not the cross-entropy of its labels") == 1


def test_a_little_smoothing_shows_in_a_model_that_knows_nothing_yet(rng, monkeypatch):
    """Where all tokens are as likely, the smoothed loss is the cross-entropy itself."""
    model, batch = Smooths(LlamaConfig(**CAUSAL)).train(), draw_batch()
    monkeypatch.setattr(Smooths, "smoothing", 0.002)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert_same_training(model, patch(copy.deepcopy(model)), batch)


def test_a_model_without_a_loss_asks_for_labels_that_stand_where_their_logits_are(rng):
    patched, batch = patch(HasNoLoss(LlamaConfig(**CAUSAL))).train(), draw_batch()
    with pytest.raises(ValueError, match=r"labels: HasNoLoss has no loss of its own.*pass shift_labels"):
        patched(**batch)
    assert patched(**batch, shift_labels=batch["labels"]).loss > 0


class Texts(Dataset):
    def __init__(self, count):
        self.ids = torch.randint(3, 50, (count, 9))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        labels = self.ids[index].clone()
        labels[: 1 + index % 5] = -100
        return {"input_ids": self.ids[index], "labels": labels, "not a column": 1}


def test_the_trainer_takes_the_same_steps_with_a_patched_model(rng, seed, tmp_path, monkeypatch):
    """Two micro-batches a step with different numbers of labels: both losses are divided by those of the whole."""
    model, data = MODELS["causal"](), Texts(8)

    def train(model):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2,
            optim="sgd", learning_rate=0.5, report_to="none", save_strategy="no", use_cpu=True, seed=seed % 1000,
            disable_tqdm=True,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=data).train()
        return {name: p.detach() for name, p in model.named_parameters()}

    expected = train(copy.deepcopy(model))
    patched = patch(copy.deepcopy(model))
    calls = []
    monkeypatch.setattr(
        "tabom.training.patch.computes_loss", lambda *a, **k: calls.append(computes_loss(*a, **k)) or calls[-1]
    )
    torch.testing.assert_close(train(patched), expected)
    assert calls == [True] * 4
    assert inspect.signature(patched.forward) == inspect.signature(model.forward)


def test_unpatch_leaves_nothing_behind(rng):
    model, batch = MODELS["causal"]().train(), draw_batch()
    before = set(vars(model)), set(vars(model.lm_head))
    plain = type(model), type(model.lm_head)
    patched = patch(model)
    assert patched is model and type(model).__name__ == "LlamaForCausalLM" and isinstance(model, LlamaForCausalLM)
    held = model.forward  # as a wrapper would hold it
    assert patched(**batch).logits is None
    with pytest.raises(ValueError, match="computes a loss already; unpatch it first"):
        patch(model)
    assert unpatch(model) is model and (type(model), type(model.lm_head)) == plain
    assert (set(vars(model)), set(vars(model.lm_head))) == before
    assert model(**batch).logits is not None and held(**batch).logits is not None
    with pytest.raises(ValueError, match="this LlamaForCausalLM is not patched"):
        unpatch(model)


def test_lora_before_and_after(rng):
    lora = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model, batch = peft.get_peft_model(MODELS["causal"](), lora).train(), draw_batch()
    assert_same_training(model, patch(copy.deepcopy(model)), batch)
    on_head = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    with pytest.raises(ValueError, match=r"head of this LlamaForCausalLM is peft.*only a plain torch.nn.Linear"):
        patch(peft.get_peft_model(MODELS["causal"](), on_head))


@pytest.mark.parametrize(
    "settings", [{"target_modules": ["lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}]
)
@pytest.mark.parametrize("checked_before", [False, True])
def test_a_head_that_is_wrapped_later_computes_logits_with_one_warning(rng, caplog, settings, checked_before):
    model, batch = patch(MODELS["causal"]().train()), draw_batch()
    if checked_before:
        assert model(**batch).logits is None
    late = peft.get_peft_model(model, peft.LoraConfig(**settings, init_lora_weights=False)).train()
    for _ in range(2):
        assert late(**batch).logits is not None
    assert caplog.text.count("the loss is computed from logits, and not in the head: its head is peft") == 1
    unpatch(late)
    assert not any(isinstance(module, HeadWithLoss) for module in late.modules())


def test_a_copy_computes_its_own_loss(rng):
    model, batch = patch(MODELS["causal"]()).train(), draw_batch()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert abs(other(**batch).loss.item() - torch.tensor(50.0).log().item()) < 1e-5
    assert abs(model(**batch).loss.item() - torch.tensor(50.0).log().item()) > 1e-3


@pytest.mark.parametrize("build", [MODELS["causal"], MODELS["masked"]], ids=["causal", "masked"])
def test_a_resized_head_computes_the_loss(rng, build):
    model, batch = build().train(), draw_batch()
    patched = patch(copy.deepcopy(model))
    for resized in (model, patched):
        torch.manual_seed(0)
        resized.resize_token_embeddings(57)
    assert assert_same_training(model, patched, batch).logits is None
    unpatch(patched)
    assert type(patched.get_output_embeddings()) is torch.nn.Linear


def test_what_cannot_be_patched_is_refused():
    with pytest.raises(TypeError, match="model: expected a transformers model, got Linear"):
        patch(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"head of this BertForSequenceClassification is .*NoneType"):
        patch(BertForSequenceClassification(BertConfig(**BERT_SIZES)))
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    with pytest.raises(ValueError, match="BartForConditionalGeneration is an encoder-decoder"):
        patch(BartForConditionalGeneration(BartConfig(**sizes, vocab_size=50)))


def test_a_model_whose_head_does_not_fit_keeps_its_own_loss(rng, caplog):
    config = EsmConfig(**BERT_SIZES, mask_token_id=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model, batch = EsmForMaskedLM(config).train(), draw_batch()
    expected, expected_grads = loss_and_gradients(copy.deepcopy(model), **batch)
    patch(model)
    for _ in range(2):
        output, grads = loss_and_gradients(model, **batch)
        torch.testing.assert_close((output.loss, grads), (expected.loss, expected_grads))
        assert grads["lm_head.bias"].any()
    assert caplog.text.count("the loss is computed from logits, and not in the head") == 1
    with pytest.raises(ValueError, match="token_weights: the head of this EsmForMaskedLM does not compute the loss"):
        model(**batch, token_weights=torch.ones(batch["labels"].shape))
