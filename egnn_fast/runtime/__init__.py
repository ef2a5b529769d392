"""What every call needs: the state of PyTorch, settings of the process, the C++ extension."""
