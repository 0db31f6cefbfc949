"""Giving blocks their SE blocks and taking them out again: the only room that changes a model.

Neighbours use ``site.Site`` (one SE block to be inserted), ``insert.insert``, ``insert.withdraw``
and ``insert.restore`` (all sites of a model or none of them), ``insert.injected`` and
``insert.is_injected`` (which blocks have SE blocks), and ``block_class.edit_of`` with the ``Edit``
that it returns (what was done to one block).
"""
