"""One arm of a run: a network, its images and Lightning.

network.py      builds the base that MODEL names, with its weights and a head for the classes
prepare.py      makes the network and the data that an arm begins with
recipe.py       the LightningModule: what is frozen when, the loss, the metrics
optimizer.py    timm's optimizers and schedules; tune.py finds the rate and the batch size
machine.py      the processes, the Lightning Trainer and stops; loggers.py makes its loggers
callbacks.py    keeps the results of each epoch; progress.py prints them
arm.py          puts all of these together: one arm with one seed
"""
