"""Charged-particle dynamics: where five particles will be 1,000 time steps on.

The data set of Fuchs et al. (2020) and Kipf et al. (2018) as section 5.1 of the EGNN paper
(arXiv 2102.09844) uses it, simulated bit for bit as the official code does.
"""
