"""Turns each block of a model into a ``torch.fx`` graph with facts about what its nodes compute.

The model's forward is recorded once, on a copy on meta tensors. Each module that adds two maps in
its own forward is then traced alone, with every child as a leaf, and its graph is run to learn
shapes, channels and operations. The files, in the order of the flow:

- thread: what the planning thread is doing. frames: whose code it is running. containers: nested
  tuples, lists and dicts of tensors.
- thread_state: what planning changes in its thread, and how it is put back. held: what a module
  keeps in objects of its own.
- copies: the copy of the model. foreign: its parts that are not Python code on floats. meta:
  forwards on meta tensors. example: the arguments of the forward.
- operations (a package): what the torch functions of a forward do to feature maps.
- recording (a package): one forward of the copy, and what was seen of it.
- tracing (a package): one block and its recorded calls become a graph. expect: what the new
  forward checks in every call. source: a graph as the text of a forward. same: which blocks trace
  to the same graph.
- facts: what each node of a graph computed.
- trace: all of this for a whole model. history_blocks: the graphs that units end in. macs: the
  multiply-accumulates of a forward.

The rooms below use ``trace_blocks`` with its ``TracedBlock`` and ``UntracedBlock``, the facts and
the operations, ``Arguments`` and ``History`` of recording, the examples, and ``ForwardSource``.
"""
