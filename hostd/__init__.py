"""hostd: the tree that runs on VM hosts. Standard library only; imports nothing of the project's other apps.

The server side may import one module of it, :mod:`hostd.messages` (the protocol, typed once), and
:mod:`hostd.bundle`, which packs the tree into the file that is shipped to hosts.
"""
