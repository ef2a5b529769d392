"""The names of the backends, without PyTorch: the command line reads them too."""

BACKENDS = ("reference", "cpu", "triton")
AUTO = "auto"  # the fastest that supports the call
