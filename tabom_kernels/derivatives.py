"""The closed forms are first derivatives: what asks for more is told so, and never given zeros."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

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
