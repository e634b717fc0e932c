"""The lab's model: a Llama with bidirectional attention (the LLaDA convention) over single characters."""

import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", "mask_token": "<mask>"}
CHARACTERS = string.digits + string.ascii_lowercase + " +-=."


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each character; saves and loads in the Hugging Face format."""
    tokens = [*SPECIAL_TOKENS.values(), *CHARACTERS]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **SPECIAL_TOKENS,
    )


def tiny_config(tokenizer: PreTrainedTokenizerFast, block_size: int | None = None) -> LlamaConfig:
    """The config of the lab's model, which has about one million parameters.

    Args:
        block_size: of block-causal attention, in tokens; None is full attention.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.is_causal = False
    config.mask_token_id = tokenizer.mask_token_id
    if block_size is not None:
        config.block_size = block_size
    return config


def tiny_model(tokenizer: PreTrainedTokenizerFast, block_size: int | None = None) -> LlamaForCausalLM:
    """A freshly initialised model (from torch's global generator), with the attention of `tiny_config`."""
    model = LlamaForCausalLM(tiny_config(tokenizer, block_size))
    model.generation_config = GenerationConfig(
        max_new_tokens=4, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model
