"""Programs that are timed beside each other: each a script that runs in an environment of its own."""
