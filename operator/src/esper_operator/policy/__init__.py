"""What to do about a run: small pure policies, one file each, in the order of `esper_operator.decide`.

A policy looks at one Observation and returns a Plan when the case is its own, else None.
"""
