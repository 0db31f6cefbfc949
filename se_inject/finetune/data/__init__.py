"""What ``--data`` names -> labelled images, the same in every run.

sources.py    digits, folders, tables, shards, hub and torchvision, by their names
folders.py    folders of images; images.py opens one
tables.py     ``FILE.csv``; shards.py WebDataset; hub.py Hugging Face
parts.py      the parts train, val and test; divide.py divides, split.py keeps it in the run
loading.py    a part -> batches: order and augmentation follow seed and epoch
"""
