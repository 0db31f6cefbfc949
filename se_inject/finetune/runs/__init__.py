"""A run folder: its arms and seeds, one writer, and going on after a stop.

trainer.py    one command: ``start`` and ``resume``
lock.py       one writer a run folder
records.py    what a run folder says of itself, and edits of its settings
"""
