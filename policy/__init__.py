"""Alpha-aware VAE, DiT over RGBA stacks, text conditions, flow SDE and objectives. No Ray, no DeepSpeed."""
