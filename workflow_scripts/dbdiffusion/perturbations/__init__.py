"""Effect sizes, embeddings, clusters, gene features and locations of perturbations."""
