"""A model becomes one ``torch.fx`` graph a block, with facts about what each node computes.

The model's forward is recorded once on a copy on meta tensors (:mod:`.meta`, :mod:`.record`). Each
module that adds two maps in its own forward is then traced alone, every child a leaf
(:mod:`.trace`, :mod:`.tracer`), and the graph is run to learn shapes, channels and operations
(:mod:`.facts`).

The rooms below use ``trace_blocks`` with its ``TracedBlock`` and ``UntracedBlock``, the facts and
operations of :mod:`.facts` and :mod:`.ops`, the examples of :mod:`.example`, and ``ForwardSource``,
which turns a graph into the text of a forward.
"""
