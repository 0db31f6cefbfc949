"""What is inserted: the SE block with its variants, its cost, and timm's other attention layers.

Neighbours use ``SqueezeExcite`` and ``bottleneck_width`` (squeeze_excite), ``Variant`` (variant),
``Layout``, ``KINDS`` (layout), ``SECost``, ``se_cost`` (cost), ``Attention`` (attention),
``IdentityStart`` (identity_start), and the tables ``GATES`` and ``SQUEEZES``. Nothing here knows
about graphs or models.
"""
