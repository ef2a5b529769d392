"""The official EGNN code's classes on fused layers: switching is one import line.

=================  ==========================================  =======================
module             official module                             classes
=================  ==========================================  =======================
``egnn_clean``     ``models.egnn_clean.egnn_clean``            ``E_GCL``, ``EGNN``
``gcl``            ``models.gcl``                              ``E_GCL``, ``E_GCL_vel``
``nbody``          ``n_body_system.model``                     ``EGNN``, ``EGNN_vel``
``qm9``            ``qm9.models``                              ``E_GCL_mask``, ``EGNN``
``ae``             ``models.ae``                               ``AE_EGNN``
=================  ==========================================  =======================

Constructor arguments and their order, defaults, forward signatures, returns and ``state_dict``
keys are the official ones; with the same seed the initial weights are equal bit for bit.
Wherever they take edges they take a :class:`egnn_fast.Graph` too. Each constructor takes
``backend`` as a further keyword. Unlike the official code they never write into the caller's
coordinates, ``node_attr`` works, and the autoencoder's ``w`` and ``b`` train on every device.
A residual over unequal widths, which officially broadcasts or crashes, is an error here.
"""

from __future__ import annotations

from egnn_fast.compat import ae, egnn_clean, gcl, nbody, qm9

__all__ = ["ae", "egnn_clean", "gcl", "nbody", "qm9"]
