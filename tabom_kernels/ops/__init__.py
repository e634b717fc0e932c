"""The differentiable functions of the package, and the torch.library ops behind them."""
