"""The command line. Each command has its own file, which parses, calls and prints.

``app.main`` is the entry point of the ``se-inject`` script. ``options.py`` makes the options of a
command from the fields of a dataclass, so that each option is written only once. This is the
topmost room: it may import from all others, and none of them imports from it. Only the commands of
fine-tuning import Lightning, and only when they run.
"""

import gc

# The half a million objects that importing torch has made stay to the end. Otherwise the garbage
# collector would look at all of them again while the commands are imported: 0.2 s of each start.
gc.freeze()
