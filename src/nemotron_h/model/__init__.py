"""The hybrid as single-device modules, and the state passed through it."""
