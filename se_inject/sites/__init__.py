"""Block graph -> the places where an SE block can go. This room reads graphs and changes none.

The files, in the order of the flow:

- flow is the data flow of a graph, additions finds the nodes that add two maps, and memory knows
  what changes a map in place and who notices.
- residual has the rule that tells a residual addition from others. It uses fusion (decoders and
  sums of two paths), collapse (sums that a block can fold) and nested (additions inside others'
  branches).
- placements says where at a residual addition the SE block goes, scaled describes the map that it
  scales, and find does all of this for one graph.
- units, joins and chains, with unit_flow and unit_point, do the same for networks without
  additions.

Neighbours use ``find_sites`` and ``Rejection`` (find), ``ResidualSite`` and ``UnitSite`` (scaled),
``find_units`` (units), and ``Placement`` with the table ``PLACEMENTS`` (placements).
"""
