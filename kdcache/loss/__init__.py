"""What the loss is, and what computes it; nothing of training."""
