"""Charged-particle dynamics: predict the positions of five particles after 1,000 time steps.

The data set is that of Fuchs et al. (2020) and Kipf et al. (2018), as used in section 5.1 of the
EGNN paper (arXiv 2102.09844). It is simulated here, bit for bit equal to the official one.
"""
