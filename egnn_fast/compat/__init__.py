"""The classes of the official EGNN code on fused layers. To switch, change the import line.

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
keys are the official ones. With the same seed the initial weights are equal bit for bit.

Additions: arguments for edges may be a :class:`egnn_fast.Graph`, and each constructor has a keyword
``backend``.

Differences: the caller's coordinates are never written to, ``node_attr`` works, and the
autoencoder's ``w`` and ``b`` train on every device. A residual between unequal widths raises; the
official code broadcasts or crashes.
"""

from __future__ import annotations

from egnn_fast.compat import ae, egnn_clean, gcl, nbody, qm9

__all__ = ["ae", "egnn_clean", "gcl", "nbody", "qm9"]
