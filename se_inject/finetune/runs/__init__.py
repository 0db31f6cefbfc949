"""A whole run: its arms and seeds, its folder, and going on after a stop.

trainer.py    trains all arms of a run: ``start`` and ``resume``
lock.py       lets only one process write to a run folder
records.py    reads what a run folder keeps, and checks edits of its settings
"""
