"""One block, its children leaves -> an ``fx`` graph of its forward.

In the order of the flow: patches and replaced (what is replaced in torch for this thread
meanwhile), undisturbed (puts back what a forward changed), arguments (what the forward is given),
tracer (the mode that writes each function into the graph), functions (what the functions are to
it), nodes (builds the graph), values, number, shape and machine (what stands for sizes, numbers
and devices), watch and legacy (what no mode sees), and block, which does all
of it for one block and says in words why there is no graph, where there is none.
"""
