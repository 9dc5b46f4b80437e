"""Tokens: training and reading a tokenizer, and streaming text out of it. No torch."""
