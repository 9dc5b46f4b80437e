"""Nemotron-H: hybrid Mamba-2/Transformer language models, trained, saved and run by one arithmetic."""

__version__ = "0.1.0"
