"""Fine-tune what was added: ``se-inject finetune``, on Lightning and timm.

    Settings ──▶ data ──▶ arms (with SE, control) × seeds ──▶ Lightning ──▶ run folder ──▶ summary

    settings.py   all options of a run; config.py keeps them in ``config.json``
    sources.py    what ``--data`` names -> labelled images (folders, tables, shards, hub, images)
    split.py      which image is trained on, validated on or kept for the test
    data.py       a source -> training and validation set, the same in every run
    network.py    MODEL -> the base with its weights, a head for the classes
    recipe.py     the LightningModule: what is frozen when, rates, loss, metrics
    results.py    the summary, its verdict, the curves
    callbacks.py  what a run keeps after each epoch, and what it says
    machine.py    processes, the Lightning Trainer, stops
    arm.py        one arm with one seed
    trainer.py    one command: ``start`` and ``resume``
    evaluate.py   the best network of a run, measured and asked about images
    looked.py     the images that its gates are looked at with
    page.py       ``page.html`` of a run; page_figures.py draws its pictures

The command line uses ``Settings``, ``start``, ``resume``, ``load_run``, ``evaluate``, ``predict``,
``looked`` and ``write_page``; nothing else of this room is for others. All but ``settings.py`` and
``config.py`` import Lightning, which is an extra (``pip install 'se-inject[finetune]'``).
"""
