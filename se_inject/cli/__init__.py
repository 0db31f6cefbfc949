"""The command line: one file a command, which parses, calls and prints.

``app.main`` is the entry point of the ``se-inject`` script; ``options.py`` makes the options of a
command from the fields of a dataclass, so that no option is written here and there. Nothing is
below this room, and no other room imports from it. Lightning is imported by the commands of
fine-tuning alone, when they run.
"""
