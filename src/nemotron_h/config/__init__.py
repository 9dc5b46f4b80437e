"""All settings: frozen values that validate when built. No torch."""
