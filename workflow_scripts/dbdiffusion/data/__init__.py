"""From a count matrix to clean cells, moments and splits."""
