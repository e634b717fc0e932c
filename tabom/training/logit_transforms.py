"""What models do to the logits of their head, by model type."""

from typing import NamedTuple

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from tabom.models.families import FAMILIES


class LogitFields(NamedTuple):
    """The fields of a config that say how a model changes the logits of its head; a field that is None has no effect.

    The logits are multiplied by `scale`, divided by `divisor`, soft-capped (softcap * tanh(logits / softcap)), and
    only the first `columns` of them are kept.
    """

    scale: str | None = None
    divisor: str | None = None
    softcap: str | None = None
    columns: str | None = None


GRANITE = ("granite", "granite4_vision_text", "granite_docling_text", "granite_swa", "granitemoe", "granitemoe_swa")
GRANITE += ("granitemoehybrid", "granitemoeshared")
GEMMA = ("gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "gemma4_unified_text", "diffusion_gemma_text")
GEMMA += ("t5_gemma_module", "t5gemma2_decoder", "t5gemma2_text", "vaultgemma")

LOGIT_FIELDS: dict[str, LogitFields] = {
    **dict.fromkeys([*CONFIG_MAPPING_NAMES, *FAMILIES], LogitFields()),
    **dict.fromkeys(
        [*GEMMA, "beam", "mistral_large4_text", "nanochat"], LogitFields(softcap="final_logit_softcapping")
    ),
    **dict.fromkeys(["cohere", "cohere2", "cohere2_moe", "cohere_compass_text"], LogitFields(scale="logit_scale")),
    **dict.fromkeys(GRANITE, LogitFields(divisor="logits_scaling")),
    **dict.fromkeys(
        ["muse_glimmer_text", "muse_spark_text"],
        LogitFields(scale="output_multiplier", softcap="final_logit_softcapping"),
    ),
    "falcon_h1": LogitFields(scale="lm_head_multiplier"),
    "hyperclovax": LogitFields(scale="logits_scaling"),
    "inkling_text": LogitFields(columns="unpadded_vocab_size"),
    **dict.fromkeys(
        ["inkling2_text", "inkling2_loop_text"],
        LogitFields(softcap="final_logit_softcapping", columns="unpadded_vocab_size"),
    ),
    "recurrent_gemma": LogitFields(softcap="logits_soft_cap"),
    "xlstm": LogitFields(softcap="output_logit_soft_cap"),
}
"""By the `model_type` of the text config. Types of transformers that do nothing to their logits have no field; a type
that is missing is not known, and its loss is computed from logits until it is added here."""


class LogitTransform(NamedTuple):
    """softcap * tanh(scale * logits / softcap), or scale * logits, of the first `columns` logits or of all."""

    scale: float
    softcap: float | None
    columns: int | None


def logit_transform(config: PreTrainedConfig) -> LogitTransform | None:
    """What the model does to the logits of its head; None if its type is not in `LOGIT_FIELDS`."""
    config = config.get_text_config()
    if config.model_type not in LOGIT_FIELDS:
        return None
    fields = LOGIT_FIELDS[config.model_type]
    scale, divisor, softcap, columns = (None if name is None else getattr(config, name, None) for name in fields)
    return LogitTransform((1.0 if scale is None else scale) / (1.0 if divisor is None else divisor), softcap, columns)
