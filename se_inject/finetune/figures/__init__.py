"""What a network and a run are worth: figures, tables and pictures.

measure.py     a network on a set of images: accuracies, balanced and by class
results.py     the summary of a run and its verdict
pictures.py    curves and the confusion matrix
"""
