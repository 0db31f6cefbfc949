"""Block graph -> the places where an SE block can go. This room reads graphs and changes none.

Neighbours use ``find_sites``, ``ResidualSite`` and ``Rejection`` (find), and ``Placement`` with the
table ``PLACEMENTS`` (placements). flow has the data flow of a graph, residual the rule that tells
a residual addition from others.
"""
