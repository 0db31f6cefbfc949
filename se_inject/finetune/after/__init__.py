"""What can be done with a finished run.

trained.py     loads its chosen network; evaluate.py measures it, predict.py predicts with it
looked.py      gives the images on which its gates are observed
page.py        writes ``page.html``; page_figures.py draws its pictures
"""
