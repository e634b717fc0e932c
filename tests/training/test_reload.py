"""Every folder that training leaves loads again, as the model that was trained."""

from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from tabom import TabomConfig, TabomTrainer, Trajectory, load
from tabom.lab.model import character_tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
DISTILBERT = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2}

MODELS = {
    "modernbert": (ModernBertForMaskedLM, ModernBertConfig, SIZES, "Wqkv"),  # no causal class
    "distilbert": (DistilBertForMaskedLM, DistilBertConfig, DISTILBERT, "q_lin"),  # no causal class
    "bert": (BertForMaskedLM, BertConfig, SIZES, "query"),
    "roberta": (RobertaForMaskedLM, RobertaConfig, SIZES, "query"),
    "llama": (LlamaForCausalLM, LlamaConfig, SIZES, "q_proj"),
}


def write_base(folder, name):
    architecture, config, sizes, layer = MODELS[name]
    tokenizer = character_tokenizer()
    own = {"is_causal": False, "mask_token_id": tokenizer.mask_token_id} if name == "llama" else {}
    model = architecture(config(vocab_size=60, pad_token_id=0, **TOKENS, **sizes, **own))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return architecture, layer


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("adapter", [None, {}, {"use_dora": True}], ids=["full", "lora", "dora"])
def test_every_folder_of_a_run_loads_again(tmp_path, rng, name, adapter):
    architecture, layer = write_base(tmp_path / "base", name)
    diffusion_model = load(tmp_path / "base")
    peft_config = None
    if adapter is not None:
        from peft import LoraConfig

        peft_config = LoraConfig(r=2, target_modules=[layer], **adapter)
    args = TabomConfig(
        output_dir=str(tmp_path / "run"),
        supervised_window=1,
        rank_window=2,
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=2,
        learning_rate=0.1,
        report_to="none",
        disable_tqdm=True,
    )
    data = [Trajectory("1+1=", "2345", [6, 7, 8, 9], [0, 2, 1, 3])] * 4
    trainer = TabomTrainer(
        diffusion_model.model, args, data, processing_class=diffusion_model.tokenizer, peft_config=peft_config
    )
    trainer.train()
    trainer.save_model()
    input_ids = torch.randint(4, 50, (2, 9))
    trained = trainer.model.eval()(input_ids=input_ids).logits
    untrained = load(tmp_path / "base").model(input_ids=input_ids).logits
    assert not torch.equal(trained, untrained)
    folders = sorted(Path(args.output_dir).glob("checkpoint-*"))
    assert [folder.name for folder in folders] == ["checkpoint-1", "checkpoint-2"]
    for folder in (args.output_dir, folders[-1]):
        again = load(folder)
        assert type(again.model) is architecture
        torch.testing.assert_close(again.model(input_ids=input_ids).logits, trained)
    assert type(load(folders[0]).model) is architecture
