"""Published experiments, run end to end: the only place with data sets and training loops."""
