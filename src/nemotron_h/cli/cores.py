"""How many threads a verb that computes takes."""

import os


def use_cores() -> None:
    """No more threads than this process may have cores: torch counts the machine's, a container may have fewer.

    OMP_NUM_THREADS, where it is set, is the user's own wish and stays.
    """
    import torch

    from nemotron_h.machine import cores

    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > (count := cores()):
        torch.set_num_threads(count)
