"""Numbers narrower than bfloat16: how they are stored, and what they stand for."""
