"""Fine-tune what was added: ``se-inject finetune``, on Lightning and timm.

    Settings ──▶ data ──▶ arms (with SE, control) × seeds ──▶ Lightning ──▶ run folder ──▶ summary

    choices.py    all options of a run; settings.py checks them, config.py keeps them in its folder
    sources.py    what ``--data`` names -> labelled images (folders, tables, shards, hub, images)
    parts.py      the parts train, val and test; divide.py divides, split.py keeps it in the run
    data.py       a source -> training and validation set, the same in every run
    network.py    MODEL -> the base with its weights, a head for the classes
    prepare.py    what an arm begins with: its network and its data
    recipe.py     the LightningModule: what is frozen when, loss, metrics
    optimizer.py  timm's optimizers and schedules; tune.py finds rate and batch size
    results.py    the summary and its verdict; pictures.py draws the curves
    progress.py   a line an epoch, and a bar
    callbacks.py  what a run keeps after each epoch, and what it says
    machine.py    processes, the Lightning Trainer, stops; loggers.py its loggers
    lock.py       one writer a run folder
    records.py    what a run folder says of itself, and edits of its settings
    arm.py        one arm with one seed
    trainer.py    one command: ``start`` and ``resume``
    trained.py    the best network of a run; evaluate.py measures it, predict.py asks it
    looked.py     the images that its gates are looked at with
    page.py       ``page.html`` of a run; page_figures.py draws its pictures

The command line uses ``Settings``, ``start``, ``resume``, ``load_run``, ``evaluate``, ``looked``,
``write_page`` and what ``predict.py`` has; nothing else of this room is for others. All but
``choices.py``, ``settings.py``, ``config.py`` and ``trust.py`` import Lightning, which is an extra
(``pip install 'se-inject[finetune]'``).
"""
