"""Tokens: training and reading a tokenizer, chat templates, and telling apart what streams out. No torch."""
