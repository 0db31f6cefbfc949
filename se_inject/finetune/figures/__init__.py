"""How good a network and a run are: figures, tables and pictures.

measure.py     measures a network on a set of images: its accuracies, overall and by class
results.py     makes the summary of a run and its verdict
pictures.py    draws the curves and the confusion matrix
"""
