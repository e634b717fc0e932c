"""From trajectories to a trained model: windows, targets, batches, the loss in the forward, the trainer."""
