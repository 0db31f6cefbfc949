"""One arm of a run: a network, its images and Lightning.

network.py      MODEL -> the base with its weights, a head for the classes, SE blocks
prepare.py      what an arm begins with
recipe.py       the LightningModule: what is frozen when, loss, metrics
optimizer.py    timm's optimizers and schedules; tune.py finds rate and batch size
machine.py      processes, the Lightning Trainer, stops; loggers.py its loggers
callbacks.py    what a run keeps after each epoch; progress.py what it says
arm.py          all of it: one arm with one seed
"""
