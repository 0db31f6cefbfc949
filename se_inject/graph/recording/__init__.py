"""One forward of the copy on meta, and what was seen of it.

In the order of the flow: call (what one call of a module was given, added and returned), state
(what a forward set on its module), recorder (the mode and hooks that watch), adders (modules that
only add), missed (what a forward that stopped early did not show), record (the whole recording),
replay (recorded children answer instead of running again), and history, which has all operations of
the forward in one row, for the units.
"""
