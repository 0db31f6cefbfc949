"""Fine-tuning of networks with SE blocks: ``se-inject finetune``, built on Lightning and timm.

    Settings ──▶ data ──▶ arms (with SE, control) × seeds ──▶ Lightning ──▶ run folder ──▶ summary

    options/     all options of a run, and how its folder keeps them
    data/        the labelled images that ``--data`` names: parts, order, augmentation
    figures/     how good a network and a run are: figures, the verdict, pictures
    training/    one arm of a run: a network, its images and Lightning
    runs/        a whole run: its arms and seeds, the lock of its folder, going on after a stop
    after/       what is done with the network of a finished run: evaluate, predict, gates, the page

Each room imports only the rooms above it. The command line uses ``Settings``, ``start``,
``resume``, ``load_run``, ``evaluate``, ``looked``, ``write_page`` and the functions of
``after/predict.py``. Nothing else in here is meant for other rooms. All rooms but ``options``
import Lightning, which is an extra (``pip install 'se-inject[finetune]'``).
"""
