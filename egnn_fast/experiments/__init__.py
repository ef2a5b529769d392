"""Published experiments, run end to end. Data sets and training loops are here only."""
