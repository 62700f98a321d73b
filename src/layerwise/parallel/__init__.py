"""Training on several ranks: the forward-only pipeline."""
