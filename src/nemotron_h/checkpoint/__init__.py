"""Weights and runs on disk: saved whole or not at all, loaded with every key accounted for."""
