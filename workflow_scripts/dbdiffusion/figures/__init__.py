"""Publication figures, one module each."""
