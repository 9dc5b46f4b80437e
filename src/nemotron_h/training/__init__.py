"""One loop that takes a loss: optimizer, schedule, step, metrics, resume."""
