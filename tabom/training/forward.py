"""The loss inside the model's own forward, so that DDP, FSDP and LoRA hooks fire around it."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from tabom.models.diffusion_model import logits_at
from tabom_kernels import fused_linear_tabom_loss, reference, softmax_entropy, tabom_loss

logger = logging.getLogger(__name__)


@dataclass
class LossOutput(ModelOutput):
    """Scalars in nats; `cross_entropy` and `rank` are detached. `entropy` (N,), detached, only when asked for."""

    loss: Tensor | None = None
    cross_entropy: Tensor | None = None
    rank: Tensor | None = None
    entropy: Tensor | None = None


class HeadLoss(NamedTuple):
    """The scalar loss that is differentiated, and what else a request computes."""

    loss: Tensor
    rest: Any = None


Request = Callable[[Tensor, Tensor, Tensor | None], HeadLoss | None]
"""Computes a loss from the hidden states (N, D) of all positions, and the weight (V, D) and bias (V,) of the head."""


class LinearWithLoss(torch.nn.Linear):
    """A head that gives logits, or one row of them that holds the loss that a `request` computes in their place.

    It takes the place of a linear layer's class, not of its `forward`, so that copies, casts, wrappers and
    torch.compile treat it as the layer that it is.
    """

    request: Request | None = None
    answer: HeadLoss | None = None
    fits: bool | None = None  # whether the loss is that of the model's logits; None: the model was not run yet
    gathered_logits: Callable[[Tensor], Tensor] | None = None  # of a head that is sharded over the vocabulary

    def forward(self, hidden: Tensor) -> Tensor:
        if self.request is not None:
            self.answer = self.request(hidden.reshape(-1, hidden.shape[-1]), self.weight, self.bias)
        if self.answer is None:
            return (self.gathered_logits or super().forward)(hidden)
        loss, columns = self.answer.loss, self.out_features
        others = loss.new_zeros(columns) if self.fits else probe_row(columns).to(loss)
        row = torch.cat([loss[None], others[1:]])
        return row.expand(*[1] * (hidden.dim() - 1), -1).clone()  # no view: models may write to their logits


PROBE = (-16384.0, 0.0, 1.0, 16384.0)
"""Logits that every half precision holds exactly: what scales, caps or moves logits changes one of them."""


def probe_row(columns: int) -> Tensor:
    """`PROBE` over and over, one row as long as logits are."""
    return torch.tensor(PROBE).repeat(-(-columns // len(PROBE)))[:columns]


def logit_transform(config: PreTrainedConfig) -> dict[str, float | None]:
    """What the model does to the logits of its head, as its config says: the `logit_scale` and `softcap` of the loss.

    Soft-caps: Gemma 2 and later, T5Gemma, NanoChat (`final_logit_softcapping`), RecurrentGemma (`logits_soft_cap`),
    xLSTM (`output_logit_soft_cap`).
    Scales: Cohere (`logit_scale`), Falcon-H1 (`lm_head_multiplier`), HyperCLOVA X (`logits_scaling`) and Granite, which
    divides by its `logits_scaling`, as MiniCPM3 does before its head.
    """
    config = config.get_text_config()

    def first_of(*names: str) -> float | None:
        return next((value for value in (getattr(config, name, None) for name in names) if value is not None), None)

    scale = first_of("logit_scale", "lm_head_multiplier", "output_multiplier", "logits_scaling")
    if scale is not None and config.model_type.startswith("granite"):
        scale = 1 / scale
    if config.model_type == "minicpm3":
        scale = None
    return {
        "logit_scale": 1.0 if scale is None else scale,
        "softcap": first_of("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"),
    }


def add_loss_to_forward(model: PreTrainedModel, *, fused_linear: bool = True, **loss_settings: Any) -> None:
    """Lets `model(**batch)` take a batch of `TrajectoryCollator` and return a `LossOutput`.

    Without `rows` among its arguments the model's forward is what it was. With them, the head is computed together
    with the loss and the logits are never whole, if the head is a plain linear layer whose logits the model scales or
    soft-caps as its config says, if at all. Else, as with a LoRA adapter on the head, the logits of the rows are
    computed; that the model does more to its logits is found, and logged, in its first run.

    Args:
        model: any transformers model with output embeddings; its `forward` is replaced on this instance, and a linear
            head becomes a `LinearWithLoss`.
        fused_linear: False: the logits of the rows for any head.
        loss_settings: passed on to `tabom_kernels`: rank_weight, form, margin, temperature, backend.
    """
    plain_forward = model.forward
    transform = logit_transform(model.config)
    head = model.get_output_embeddings()
    if fused_linear and type(head) is torch.nn.Linear:
        head.__class__ = LinearWithLoss
        if isinstance(head.weight, DTensor) and "forward" in vars(head):  # so does transformers' tp_plan shard it
            head.gathered_logits = vars(head).pop("forward")

    def forward(*args: Any, rows: Tensor | None = None, **kwargs: Any) -> ModelOutput:
        if rows is None:
            return plain_forward(*args, **kwargs)
        return forward_with_loss(rows=rows, **kwargs)

    def forward_with_loss(
        *,
        rows: Tensor,
        labels: Tensor,
        steps: Tensor,
        cu_seqlens: Tensor,
        lengths: Sequence[int] | None = None,
        token_weights: Tensor | None = None,
        num_tokens: Tensor | None = None,
        num_sequences: Tensor | None = None,
        return_entropy: bool = False,
        **inputs: Tensor,
    ) -> LossOutput:
        batch = {"labels": labels, "steps": steps, "cu_seqlens": cu_seqlens}
        options = {"token_weights": token_weights, "num_tokens": num_tokens, "num_sequences": num_sequences}
        options |= loss_settings
        head, answer = model.get_output_embeddings(), None
        if computes_loss(head):
            if torch.compiler.is_compiling():
                lengths = None  # numbers would be compiled for
            arguments = batch | options | transform | {"lengths": lengths, "return_entropy": True}

            def of_rows(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> HeadLoss:
                result, entropy = fused_linear_tabom_loss(hidden[rows], weight, bias=bias, **arguments)
                return HeadLoss(result.loss, (result, entropy))

            ids = inputs["input_ids" if inputs.get("input_ids") is not None else "inputs_embeds"]
            answer, _ = loss_in_head(head, of_rows, model.config, plain_forward, inputs, ids.shape[:2].numel())
        if answer is not None:
            result, entropy = answer.rest
            loss = result._replace(loss=answer.loss)
        else:
            logits = logits_at(model, rows, forward=plain_forward, **inputs)
            loss = tabom_loss(logits, **batch, **options)
            entropy = softmax_entropy(logits.detach()) if return_entropy else None
        return LossOutput(*loss, entropy if return_entropy else None)

    model.forward = forward


def computes_loss(head: torch.nn.Module) -> bool:
    """Whether the head is a `LinearWithLoss` that fits: adapters hide it, and offloading replaces its forward."""
    return isinstance(head, LinearWithLoss) and head.fits is not False and "forward" not in vars(head)


def loss_in_head(
    head: LinearWithLoss,
    request: Request,
    config: PreTrainedConfig,
    forward: Callable[..., ModelOutput],
    inputs: dict[str, Any],
    positions: int,
) -> tuple[HeadLoss | None, ModelOutput]:
    """Runs the model with a head that answers a request; its answer, and the output of the model, without logits.

    `positions` is how many hidden states the loss expects.

    The loss leaves the head by the side, in the fp32 that it was computed in, as wrappers (FSDP2's mixed precision)
    cast what a module returns. What the head returns, once it is through the model, tells what the model does to its
    logits; and it keeps a gradient of zero flowing through the wrappers, whose backward hooks sit there.

    There is no answer from a model that does something else to its logits than its config says, or does not compute
    them from one hidden state a position in its head. Its head is never asked again.
    """
    columns = getattr(config.get_text_config(), "unpadded_vocab_size", None)  # Inkling cuts off the logits behind them

    def of_positions(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> HeadLoss | None:
        if len(hidden) != positions:
            return None  # as ProphetNet's, which predicts several tokens at a position
        if columns is not None:
            weight, bias = weight[:columns], None if bias is None else bias[:columns]
        return request(hidden, weight, bias)

    head.request = of_positions
    try:
        output = forward(**inputs)
        answer = head.answer
    finally:
        head.request = head.answer = None
    # Here, where compiled code has its graph of the loss: inductor drops the sum, and gives an input back as a view.
    loss = None if answer is None else answer.loss + 0 * output.logits.flatten()[0]
    if head.fits is None:
        probe, is_traced = probe_row(head.out_features)[:columns], torch.compiler.is_compiling()
        head.fits = fits_the_loss(config, answer, output.logits, probe, is_traced)
    if answer is None or head.fits is False:
        return None, output
    return answer._replace(loss=loss), type(output)(**{name: x for name, x in output.items() if name != "logits"})


@torch.compiler.disable
def fits_the_loss(
    config: PreTrainedConfig, answer: HeadLoss | None, logits: Tensor, probe: Tensor, is_traced: bool
) -> bool | None:
    """Whether a model did to its logits what its config says; None: so far, but without a graph more cannot be seen.

    Compares values on the host, which waits for the device: once for a model is enough.
    """
    transform = logit_transform(config)
    if answer is None:
        problem = "its output embeddings are not called with one hidden state a position"
    elif not is_transformed(logits, probe, transform):
        problem = f"the model changes them after its head, and not as its config says: {transform}"
    elif not is_traced and has_parameters_between(logits, answer.loss):
        problem = "the model changes them after its head by parameters that are trained"
    else:
        return True if torch.is_grad_enabled() else None
    logger.warning("%s: the loss is computed from logits, and not in the head: %s", config.model_type, problem)
    return False


def is_transformed(logits: Tensor, probe: Tensor, transform: dict[str, float | None]) -> bool:
    """Whether the row that left the head has come through the model as the transform says, but for the loss in it.

    Models compute in the dtype of their logits: untouched ones are exact, others are rounded a few times.
    """
    expected = reference.transformed(probe.double(), transform["logit_scale"], transform["softcap"])
    tolerance = 0.0 if torch.equal(expected, probe.double()) else 2 * torch.finfo(logits.dtype).eps
    found = logits.detach().flatten().cpu().double()
    return found.shape == expected.shape and torch.allclose(found[1:], expected[1:], rtol=tolerance, atol=0.0)


def has_parameters_between(logits: Tensor, loss: Tensor) -> bool:
    """Whether logits are made of a loss and of parameters, such as ESM's bias, which is zero at first."""
    nodes, seen = [logits.grad_fn], {None, loss.grad_fn}
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                return True
            nodes += [parent for parent, _ in node.next_functions]
    return False
