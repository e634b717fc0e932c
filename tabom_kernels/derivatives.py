"""The closed forms are first derivatives: what asks for more is told so, and never given zeros."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import CustomOpDef
from torch.nn import Parameter

MESSAGE = "first derivatives only; backend='reference' has all of them"


def refuse_second_derivatives() -> None:
    """To be called in backward, which runs with grad mode on only if its result is to be differentiated again.

    Raises:
        NotImplementedError: it is.
    """
    if torch.is_grad_enabled():
        raise NotImplementedError(f"create_graph=True: {MESSAGE}")


def refuse_forward_mode(backend: str, *arguments: object) -> None:
    """Forward-mode derivatives and the transforms of torch.func see nothing of what happens inside an op.

    Raises:
        NotImplementedError: an argument carries a tangent, or is under a transform of torch.func that differentiates.
    """
    if backend == "reference" or torch.compiler.is_compiling():
        return
    for tensor in arguments:
        if not isinstance(tensor, Tensor):
            continue
        if forward_ad.unpack_dual(tensor).tangent is not None or torch._C._functorch.is_gradtrackingtensor(tensor):
            raise NotImplementedError(f"forward mode and torch.func: {MESSAGE}")


def differentiable(op: CustomOpDef, setup_context: Callable, backward: Callable, results: int) -> Callable[..., Any]:
    """Registers the derivative of `op`, and returns what calls it for its first `results` outputs.

    That is the op only for what traces or compiles: in eager mode the dispatcher's Python and the schema of a custom op
    take longer than to launch all of its kernels, and every output has a place in the graph.
    """
    op.register_autograd(backward, setup_context=setup_context)

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = op._init_fn(*inputs)
        setup_context(ctx, inputs, output)
        return output[:results]

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(op._name, (torch.autograd.Function,), methods)

    def call(first: Tensor, *arguments: Any) -> Any:
        return function.apply(first, *arguments) if is_eager(first) else op(first, *arguments)[:results]

    return call


def call_directly(op: CustomOpDef, first: Tensor, *arguments: Any) -> Any:
    """The same for an op without a derivative."""
    return (op._init_fn if is_eager(first) else op)(first, *arguments)


def is_eager(tensor: Tensor) -> bool:
    """Whether an op on `tensor` computes at once: it has memory, and is nothing that traces, compiles or counts."""
    return not torch.compiler.is_compiling() and type(tensor) in (Tensor, Parameter) and not tensor.is_meta
