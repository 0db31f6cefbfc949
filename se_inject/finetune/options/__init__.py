"""The options of a run, and how a run folder keeps them. Nothing here needs Lightning.

choices.py, data_choices.py    the options by the panels of the help: type, default, limits
settings.py                    all of them together, and which go together
config.py                      settings <-> ``config.json`` and ``--config FILE.yaml``
trust.py                       code that a run folder names is imported only where asked for
"""
