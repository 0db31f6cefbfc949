"""Makes a network for inference: fewer operations, and outputs that are equal up to rounding.

Neighbours use ``optimize.optimize_for_inference`` (public), and ``optimize.optimized_copy``, which
also says what was done. Each step is one file: ``norms`` folds norms into the convolutions before
them, ``constant`` folds gates that are the same for every image, and ``squeeze`` moves the squeeze
before the last convolution.
"""
