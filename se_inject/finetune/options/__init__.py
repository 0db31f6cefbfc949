"""The options of a run, and how a run folder keeps them. Nothing here needs Lightning.

choices.py, data_choices.py    each option with its type, default, help and limits
settings.py                    all options in one class, and the check that they fit together
config.py                      reads and writes ``config.json``, and reads ``--config FILE.yaml``
trust.py                       refuses code that a run folder names unless the user trusts it
"""
