"""Training: the REPA-E step, the latent-only step, and the loop around them."""
