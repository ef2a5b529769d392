"""PyTorch's side of a layer: its operators with their derivatives. Knows torch, no kernel."""
