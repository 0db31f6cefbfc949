"""Keeping what was injected: files of SE blocks, and exports that need no se_inject.

Neighbours use ``save.save_se`` and ``load.load_se``, ``read.read_header`` (what a file says,
without its tensors), ``restore.restore_model`` (builds the saved network from a file and the name
of its base), ``atomic.atomic_write`` (for every file that must be whole or not there) and
``formats.FORMATS`` (the export formats).
"""
