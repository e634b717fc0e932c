"""Post-training of pretrained models: `python -m benchmarks.pretrained`."""
