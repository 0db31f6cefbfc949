"""The labelled images that ``--data`` names, the same in every run.

sources.py    opens what a name stands for: digits, a folder, a table, shards, or a library's data
folders.py    reads folders of images; images.py opens a single image
tables.py     reads ``FILE.csv``; shards.py reads WebDataset; hub.py reads Hugging Face
parts.py      the parts train, val and test; divide.py makes them, split.py keeps them in the run
loading.py    turns a part into batches; their order and augmentation follow from seed and epoch
"""
