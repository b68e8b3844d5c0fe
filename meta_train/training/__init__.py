"""Meta-training: recipes, the meta-gradient, the outer loop and its run directory. It knows nothing of judging."""
