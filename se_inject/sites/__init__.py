"""Block graph -> the places where an SE block can go. This room reads graphs and changes none.

The files, in the order of the flow:

- flow: the data flow of a graph; additions: which nodes add two maps; memory: who changes a map in
  place, and who sees it.
- residual: the rule that tells a residual addition from others, with fusion (decoders and sums of
  two paths), collapse (sums that a block can fold) and nested (additions inside others' branches).
- placements: where at a residual addition the SE block goes; scaled: the map that it scales; find:
  all of it for one graph.
- units, joins, chains, with unit_flow and unit_point: the same for networks without additions.

Neighbours use ``find_sites`` and ``Rejection`` (find), ``ResidualSite`` and ``UnitSite`` (scaled),
``find_units`` (units), and ``Placement`` with the table ``PLACEMENTS`` (placements).
"""
