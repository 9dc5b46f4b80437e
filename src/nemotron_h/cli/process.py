"""How this process takes its machine, in a verb that computes."""

import os

# of --precision
HELP_PRECISION = "bfloat16, float32, int8, int4, or auto: as the folder's integers are, else what is fast here."
# of --keys-values
HELP_KEYS_VALUES = "int8: keys and values take half the memory and are rounded; auto: as the model computes."
# of --drafts
HELP_DRAFTS = "Guess tokens from what followed the last ones before; none changes: auto (where it pays), always, off."


def settle() -> None:
    """No more threads than this process may have cores, torch counting the machine's where a container may have fewer;
    and what was freed is kept.

    OMP_NUM_THREADS, where it is set, is the user's own wish and stays.
    """
    import torch

    from nemotron_h.machine import cores, tune_memory

    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > (count := cores()):
        torch.set_num_threads(count)
    tune_memory()
