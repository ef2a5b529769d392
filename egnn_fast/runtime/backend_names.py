"""The names of the backends. Imports no PyTorch, so that the command line starts quickly."""

BACKENDS = ("reference", "cpu", "triton")
AUTO = "auto"  # the fastest backend that supports the call
