"""The implementations of the ops: `reference` under autograd, `torch` and `triton` with closed-form gradients."""
