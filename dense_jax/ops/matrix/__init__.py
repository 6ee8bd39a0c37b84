"""Matrix states, one decay a head: retention and Mamba-2.

`reference.py` is the specification, `sequence.py` and `token.py` are the recurrences that layers
make by `form.py`, and the other files are what they run; `tpu*.py` and `cpu.py` are for those
platforms only.
"""
