"""Base networks: how they are built by name, their weights in files, and the size of their images.

Neighbours use ``load_model`` (names), ``load_weights`` (files) and ``input_size`` (sizes).
"""
