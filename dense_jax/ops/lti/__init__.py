"""Linear time-invariant systems, one per channel: S4 and S4D.

`reference.py` is the specification. Layers make recurrences through `form.py`; `sequence.py` and
`token.py` hold their classes, and the other files the computations that they run.
"""
