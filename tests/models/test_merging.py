"""`tabom merge`: an adapter and its base become one folder, which loads without peft and without the base."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from tabom import TabomConfig, TabomTrainer, Trajectory, load, merge_adapter
from tabom.cli.main import main
from tests.models.block_causal import make_checkpoint
from tests.models.test_families import write_dream, write_llada
from tests.training.test_reload import write_base

peft = pytest.importorskip("peft")


def train_adapter(base, output, **settings):
    """An adapter after two steps that change it much, and the logits of base and adapter together."""
    args = TabomConfig(
        output_dir=str(output),
        supervised_window=1,
        rank_window=2,
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.1,
        report_to="none",
        disable_tqdm=True,
    )
    data = [Trajectory("1+1=", "2345", [6, 7, 8, 9], [0, 2, 1, 3])] * 4
    trainer = TabomTrainer(str(base), args, data, peft_config=peft.LoraConfig(r=2, **settings))
    trainer.train()
    trainer.save_model()
    return trainer.model.eval()


def write_tied_llada(folder):
    return write_llada(folder, weight_tying=True)


def write_block_causal(folder, model_type):
    folder.rmdir()
    make_checkpoint(folder, model_type)


@pytest.mark.parametrize(
    ("write", "settings"),
    [
        (write_dream, {"target_modules": ["q_proj", "down_proj"]}),
        (write_llada, {"target_modules": ["q_proj"], "use_dora": True}),
        (write_tied_llada, {"target_modules": "all-linear"}),
        (lambda folder: write_base(folder, "modernbert"), {"target_modules": ["Wqkv"]}),
        (lambda folder: write_block_causal(folder, "sdar_moe"), {"target_modules": ["q_proj", "o_proj"]}),
        (lambda folder: write_block_causal(folder, "llada2_moe"), {"target_modules": ["q_proj", "down_proj"]}),
    ],
    ids=["dream", "llada, dora", "llada, tied", "modernbert", "sdar_moe", "llada2_moe"],
)
def test_the_merged_model_is_the_adapted_one_wherever_it_loads(tmp_path, rng, capsys, write, settings):
    base, adapter, merged = (tmp_path / name for name in ("base", "adapter", "merged"))
    base.mkdir()
    write(base)
    trained = train_adapter(base, adapter, **settings)
    before = load(base)
    input_ids = torch.randint(4, 40, (2, 9))
    expected = trained(input_ids=input_ids).logits
    assert not torch.allclose(before.model(input_ids=input_ids).logits, expected, atol=1e-4)

    assert main(["merge", "--adapter", str(adapter), "--output_dir", str(merged)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{merged}: {adapter} merged into its base, float32"
    shutil.rmtree(base)
    shutil.rmtree(adapter)
    again = load(merged)
    torch.testing.assert_close(again.model(input_ids=input_ids).logits, expected, rtol=1e-4, atol=1e-4)
    for name in ("mask_token_id", "pad_token_id", "eos_token_id", "logits_shift", "block_size"):
        assert getattr(again, name) == getattr(before, name), name
    auto = AutoModelForMaskedLM if type(again.model).__name__.endswith("MaskedLM") else AutoModelForCausalLM
    plain = auto.from_pretrained(merged)
    torch.testing.assert_close(plain(input_ids=input_ids).logits, expected, rtol=1e-4, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.get_vocab() == before.tokenizer.get_vocab()
    assert tokenizer.chat_template == before.tokenizer.chat_template
    with safe_open(merged / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert not any("lora" in name or "base_layer" in name for name in names)
    assert ("lm_head.weight" in names) == (not again.model.config.tie_word_embeddings or "decoder.weight" in names)


def test_the_dtype_of_the_merged_weights(tmp_path, rng):
    write_base(tmp_path / "base", "llama")
    train_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=["q_proj"])
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype=torch.bfloat16)
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def test_what_cannot_be_merged(tmp_path, rng, capsys):
    base, adapter, new = tmp_path / "base", tmp_path / "adapter", tmp_path / "new"
    write_base(base, "llama")
    train_adapter(base, adapter, target_modules=["q_proj"])

    capsys.readouterr()

    def error(adapter, output):
        assert main(["merge", "--adapter", str(adapter), "--output_dir", str(output)]) == 2
        [line] = capsys.readouterr().err.splitlines()
        return line

    assert f"adapter={base}: no adapter_config.json there; expected an adapter" in error(base, new)
    assert f"adapter={tmp_path}/adaptr: nothing of this name in {tmp_path}; there are adapter" in error(
        tmp_path / "adaptr", new
    )
    assert f"output_dir={base}: exists and is not empty" in error(adapter, base)
    assert f"output_dir={base}/config.json: exists" in error(adapter, base / "config.json")

    strange = tmp_path / "strange"
    shutil.copytree(adapter, strange)
    save_file(
        {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)},
        strange / "adapter_model.safetensors",
    )
    assert "layers.7.self_attn.q_proj.lora_A" in (said := error(strange, new)) and "no layer of the base" in said

    base.rename(tmp_path / "moved")
    assert f"base_model_name_or_path in {adapter}/adapter_config.json={base}: nothing of this name" in error(
        adapter, new
    )
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    assert f"base_model_name_or_path in {adapter}/adapter_config.json: empty; set it" in error(adapter, new)
    assert not new.exists()
