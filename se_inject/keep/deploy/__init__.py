"""An injected network as one that only runs: fewer operations, equal outputs up to rounding.

Neighbours use ``optimize.optimize_for_inference`` (public), and ``optimize.optimized_copy``, which
says what was done too. One step of it is one file: ``norms`` (into the convolutions before them),
``constant`` (gates that are the same for every image), ``squeeze`` (before the last convolution).
"""
