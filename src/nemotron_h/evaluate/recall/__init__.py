"""The recall audit: what a model finds again in a long text, by where it stands, and what of it serving changes."""
