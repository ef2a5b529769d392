"""The GPU kernels without a GPU: compiled, read, and their time predicted.

For maintainers: nothing here runs with the package.

- ``__main__``: compiles every shipped kernel, writes bench/results/offline.json
- ``configurations``: the kernels as a call would have them compiled; which of them are shipped
- ``compile``: compiles configurations for a GPU that need not be there
- ``disassembly``: reads machine code: its hash, instructions by class, the loop over blocks
- ``hazards``: finds registers of asynchronous products that are accessed before these are done
- ``model``: predicts the time of the edge pass from compiled code
- ``chips``: the GPUs' rates, for the model
- ``stalls``: what the model's upper end assumes of waits and rates
- ``launches``: the model's number of launches, and the host's time for them
- ``specialisations``: counts what the checks of the GPU suite have Triton compile

``__main__``, ``compile``, ``model`` and ``specialisations`` are commands:
``python -m bench.offline``, ``python -m bench.offline.model`` and so on, with ``--help``.
"""
