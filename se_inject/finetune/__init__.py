"""Fine-tune what was added: ``se-inject finetune``, on Lightning and timm.

    Settings ──▶ data ──▶ arms (with SE, control) × seeds ──▶ Lightning ──▶ run folder ──▶ summary

    options/     all options of a run, and how its folder keeps them
    data/        what ``--data`` names -> labelled images: parts, order, augmentation
    figures/     what a network and a run are worth: figures, the verdict, pictures
    training/    one arm of a run: a network, its images and Lightning
    runs/        one command, its arms and seeds, one writer, going on after a stop
    after/       the chosen network of a run: measured, asked, looked at, shown on a page

Each imports only those above it. The command line uses ``Settings``, ``start``, ``resume``,
``load_run``, ``evaluate``, ``looked``, ``write_page`` and what ``after/predict.py`` has; nothing
else of this room is for others. All but ``options`` import Lightning, which is an extra
(``pip install 'se-inject[finetune]'``).
"""
