"""Pure functions on tensors: each definition beside its fast path."""
