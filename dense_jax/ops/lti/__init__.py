"""Time-invariant systems, one a channel: S4 and S4D.

`reference.py` is the specification, `sequence.py` and `token.py` are the recurrences that layers
make by `form.py`, and the other files are what they run; `tpu*.py` and `cpu.py` are for those
platforms only.
"""
