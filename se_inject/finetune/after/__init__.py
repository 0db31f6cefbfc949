"""What a finished run is good for.

trained.py     its chosen network; evaluate.py measures it, predict.py asks it
looked.py      the images that its gates are looked at with
page.py        ``page.html``; page_figures.py draws its pictures
"""
