"""One forward of the copy on meta, and what was seen of it.

In the order of the flow: call (what one call of a module was given, added and returned), state
(what a forward set on its module), recorder (the mode and hooks that watch), adders (modules that
only add), missed (what a forward that stopped early has not shown), record (the whole recording),
replay (recorded children answer in place of running again), and history, which has the operations
of the whole forward in a row for the units.
"""
