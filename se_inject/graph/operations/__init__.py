"""What the torch functions of a forward do to feature maps.

In the order of the flow: ops (what each function is), sums (which calls add two maps), value (what
is known about a tensor), channels (where its channels are), gating (which product is a gate), log
(the mode that sees the functions run and records all of this), and shortcuts (fast replacements for
functions that are slow on meta tensors).
"""
