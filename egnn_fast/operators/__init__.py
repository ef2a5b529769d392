"""The PyTorch operators of a layer, with their derivatives. Nothing here depends on a kernel."""
