"""Which sites get what, and why the others get nothing.

Neighbours use ``plan_se`` and ``make_plan`` (planner), ``Plan`` (plan), ``Injection`` with its
``option`` (injection), ``check_model`` (checks), and the tables of ``table``.
"""
