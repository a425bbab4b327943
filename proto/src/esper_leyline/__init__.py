"""Leyline: every contract that Esper's parts share.

`esper_leyline.v1` holds the generated messages; the modules here hold the names, layouts and signatures that
the operator, the runtime and the laptop runner must agree on. Nothing here talks to anything except
`esper_leyline.oona`, the client of the message fabric.
"""
