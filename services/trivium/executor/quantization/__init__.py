"""Quantized checkpoints: from the packed tensors of a linear layer to its weight. One file per format."""
