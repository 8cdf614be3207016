"""The transformer: latent attention, router, experts, multi-token prediction, initial values, counting, generation."""
