"""Evaluation: what a model costs on a machine, measured."""
