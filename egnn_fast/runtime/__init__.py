"""What holds for a call whatever it computes: PyTorch's state, settings, the loaded extension."""
