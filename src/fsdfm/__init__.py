"""Long text from a handful of model calls."""
