"""Meta-training: make weights for ``learned_optim``, judge them, publish them."""
