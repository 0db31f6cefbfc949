"""Turns the forward of one block into an ``fx`` graph, with every child as a leaf.

In the order of the flow: patches and replaced (what is replaced in torch for this thread
meanwhile), undisturbed (puts back what a forward changed), arguments (what the forward is given),
tracer (the mode that writes each function into the graph), functions (what the functions mean to
it), nodes (builds the graph), values, number, shape and machine (what stands for sizes, numbers and
devices), watch and legacy (what no mode sees), old_parser (what older versions of torch need), and
block, which does all of this for one block. If there is no graph, block says why.
"""
