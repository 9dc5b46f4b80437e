"""Text out of a model: an engine that serves many requests, reuses what it has read, and keeps sessions."""
