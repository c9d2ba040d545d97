"""Complete networks for image restoration: training, restoring and evaluating them."""
