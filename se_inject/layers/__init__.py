"""What is inserted: the SE block with its variants, what one costs, and timm's other attention.

Neighbours use ``SqueezeExcite`` and ``bottleneck_width`` (squeeze_excite), ``Variant`` (variant),
``Layout``, ``KINDS`` (layout), ``SECost``, ``se_cost`` (cost), ``Attention`` (attention),
``IdentityStart`` (identity_start), and the tables ``GATES`` and ``SQUEEZES``. Nothing here knows of
graphs or of models.
"""
