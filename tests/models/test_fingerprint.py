"""The digest of a model's weights, in the true shapes of the models that this library is for.

The weights here are large and cost nothing: one value that is expanded, or memory of which only a few pages are ever
written.
"""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tabom.lab.dry_run import DREAM_7B, LLADA_8B
from tabom.lab.model import character_tokenizer
from tabom.models.diffusion_model import FINGERPRINT_VALUES, DiffusionModel, sample_values
from tabom.models.families import FAMILIES, native_config
from tests.largest_memory import LargestMemory

SMOLLM2 = {
    "vocab_size": 49153,  # with the mask token that --adapt adds
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
SHAPES = [(152064, 3584), (18944, 3584), (126464, 4096), (4096, 12288), (49153, 576), (2**24 + 1,), (2**24 + 3, 1)]


def real_model(name, value=1.0):
    """A model of the true size, all of whose weights are one value."""
    if name == "SmolLM2":
        architecture, config = LlamaForCausalLM, LlamaConfig(**SMOLLM2)
    else:
        settings = {"Dream": DREAM_7B, "LLaDA": LLADA_8B}[name]
        architecture, config = FAMILIES[settings["model_type"]].architecture, native_config(settings)
    with torch.device("meta"):
        model = architecture(config)
    weights = {name: torch.tensor(value).expand(weight.shape) for name, weight in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return DiffusionModel(model, character_tokenizer(), 0, 0, 0)


@pytest.mark.parametrize("name", ["Dream", "LLaDA", "SmolLM2"])
def test_models_of_the_true_size_have_a_fingerprint_that_reads_a_thousand_values_of_each_weight(name):
    model = real_model(name)
    with LargestMemory() as largest:
        fingerprint = model.fingerprint()
    assert largest.bytes <= 2 * 8 * FINGERPRINT_VALUES  # int64 coordinates in a matrix
    assert fingerprint == model.fingerprint() != real_model(name, value=2.0).fingerprint()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("order", ["rows", "columns"])
def test_the_values_of_a_weight_are_those_at_evenly_spaced_indices(shape, order):
    size = torch.Size(shape).numel()
    expected = [
        index * (size - 1) // (FINGERPRINT_VALUES - 1) for index in range(FINGERPRINT_VALUES)
    ]  # Python's integers are exact
    assert (expected[0], expected[-1], len(set(expected))) == (0, size - 1, FINGERPRINT_VALUES)
    values = (torch.arange(FINGERPRINT_VALUES) % 251 - 125).to(torch.int8)
    weight = torch.empty(shape, dtype=torch.int8)
    if order == "columns":
        weight = torch.empty(shape[::-1], dtype=torch.int8).permute(*reversed(range(len(shape))))
    weight[torch.unravel_index(torch.tensor(expected), shape)] = values
    assert sample_values(weight, FINGERPRINT_VALUES).tolist() == values.tolist()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (5,), (2, FINGERPRINT_VALUES // 2)], ids=str)
def test_all_values_of_a_small_weight_are_read(shape):
    weight = torch.arange(torch.Size(shape).numel()).view(shape)
    assert sample_values(weight, FINGERPRINT_VALUES).tolist() == weight.flatten().tolist()


@pytest.mark.parametrize("place", [0, -1])
def test_the_first_and_the_last_value_of_a_large_weight_count(model, place):
    weight = torch.zeros(2**24 + 3, dtype=torch.int8)
    model.model.register_buffer("large", weight)
    before = model.fingerprint()
    weight[place] = 1
    assert model.fingerprint() != before


def test_a_weight_without_values_is_named(model):
    model.model.model.norm.to("meta")
    with pytest.raises(ValueError, match=r"weight model\.norm\.weight is on the meta device.*one device"):
        model.fingerprint()
