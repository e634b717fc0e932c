"""Which prompts a model can answer whole: none without a token, none that is cut, none with text it does not know."""

from tabom.data.encoding import check_prompt, encode_prompt, has_unknown_text
from tabom.data.prompts import PromptSet
from tabom.models.diffusion_model import DiffusionModel


def empty_prompts(model: DiffusionModel, prompts: PromptSet) -> list[int]:
    """Indices of the prompts that have fewer tokens than the model's `logits_shift`.

    Prompts are encoded only if one can be empty: the model shifts its logits, and no BOS token begins every prompt.
    """
    if model.logits_shift == 0 or model.tokenizer.bos_token_id is not None:
        return []
    lengths = (len(encode_prompt(model.tokenizer, prompt)) for prompt in prompts.prompts)
    return [index for index, length in enumerate(lengths) if length < model.logits_shift]


def check_prompts(model: DiffusionModel, prompts: PromptSet) -> None:
    """Refuses a prompt set with such a prompt before the run starts, and not when the run reaches it.

    Raises:
        ValueError: a prompt has no token, and the model needs one; names the first such prompt.
    """
    for index in empty_prompts(model, prompts):
        try:
            check_prompt(0, model.logits_shift)
        except ValueError as error:
            raise ValueError(f"{prompts.name}, prompt {index + 1} of {len(prompts.prompts)}: {error}") from error


def remarks_on(model: DiffusionModel, prompts: PromptSet, max_prompt_length: int | None = None) -> list[str]:
    """Sentences on the prompts that the model does not read whole: how many are cut, and how many hold unknown text."""
    encoded = [encode_prompt(model.tokenizer, prompt) for prompt in prompts.prompts]
    cut = sum(max_prompt_length is not None and len(each) > max_prompt_length for each in encoded)
    unknown = sum(has_unknown_text(model.tokenizer, each) for each in encoded)
    counts = {
        f"cut to max_prompt_length={max_prompt_length} tokens": cut,
        "with text that the model's vocabulary does not have": unknown,
    }
    return [f"{prompts.name}: {count} of {len(encoded)} prompts {what}" for what, count in counts.items() if count]
