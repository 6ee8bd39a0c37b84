"""Text to batches: sources, tokenizers, packing and the training pipeline."""
