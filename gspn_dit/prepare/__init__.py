"""Commands that make data: latents, data sets, autoencoders."""
