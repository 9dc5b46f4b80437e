"""CPU kernels written in Python, compiled by numba at first use: one file per op, each beside its torch definition."""
