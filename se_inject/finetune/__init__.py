"""Fine-tune what was added: ``se-inject finetune``, on Lightning and timm.

    Settings ──▶ data ──▶ arms (with SE, control) × seeds ──▶ Lightning ──▶ run folder ──▶ summary

    settings.py   all options of a run, as ``config.json`` keeps them
    data.py       folders, ``torch/``, ``hfds/``, the embedded digits -> training and validation set
    recipe.py     the LightningModule: what is frozen when, rates, loss, metrics
    run.py        one command: its arms and seeds, the run folder, resuming

Imported by its commands only: Lightning is an extra (``pip install 'se-inject[finetune]'``).
"""
