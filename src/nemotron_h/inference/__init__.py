"""Text out of a model: loading, sampling, generating."""
