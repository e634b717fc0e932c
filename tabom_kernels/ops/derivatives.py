"""Registers the derivatives of the ops, and refuses second derivatives and forward mode.

The closed forms are first derivatives only. Without a refusal PyTorch would return zeros for other derivatives.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import CustomOpDef
from torch.nn import Parameter

MESSAGE = "first derivatives only; backend='reference' has all of them"


def refuse_second_derivatives() -> None:
    """Call this in backward, where grad mode is on only if the gradient will be differentiated again.

    Raises:
        NotImplementedError: the gradient will be differentiated again.
    """
    if torch.is_grad_enabled():
        raise NotImplementedError(f"create_graph=True: {MESSAGE}")


def refuse_forward_mode(backend: str, *arguments: object) -> None:
    """Refuses forward-mode derivatives and the transforms of torch.func, which cannot see into an op.

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
    """Registers the derivative of `op`, and returns a function that calls it and returns its first `results` outputs.

    The function calls the op only under tracing and compilation. In eager mode it calls an autograd.Function, because
    the dispatcher takes longer for a custom op than the launch of all of its kernels does, and would attach every
    output to the graph.
    """

    takes_lists = "Tensor[]" in str(op._opoverload._schema)

    def setup_op(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.tensor_lists = {i: len(x) for i, x in enumerate(inputs) if takes_lists and is_tensor_list(x)}
        setup_context(ctx, inputs, output)

    def op_backward(ctx: Any, *grads: Any) -> tuple:
        gradients = list(backward(ctx, *grads))
        for i, length in ctx.tensor_lists.items():  # torch.library expects one gradient for each tensor of a list
            gradients[i] = [None] * length
        return tuple(gradients)

    op.register_autograd(op_backward, setup_context=setup_op)

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = op._init_fn(*inputs)
        setup_context(ctx, inputs, output)
        return output[:results]

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(op._name, (torch.autograd.Function,), methods)

    def call(first: Tensor, *arguments: Any) -> Any:
        return function.apply(first, *arguments) if is_eager(first) else op(first, *arguments)[:results]

    return call


def is_tensor_list(value: object) -> bool:
    """Whether torch.library takes a value for a list of tensors; beside such a list it takes an empty one for one."""
    return isinstance(value, list | tuple) and all(isinstance(x, Tensor) for x in value)


def call_directly(op: CustomOpDef, first: Tensor, *arguments: Any) -> Any:
    """Calls an op without a derivative: its Python function in eager mode, the op under tracing and compilation."""
    return (op._init_fn if is_eager(first) else op)(first, *arguments)


def is_eager(tensor: Tensor) -> bool:
    """Whether an op on `tensor` computes at once: it is a plain tensor with memory, and nothing is being compiled."""
    return not torch.compiler.is_compiling() and type(tensor) in (Tensor, Parameter) and not tensor.is_meta
