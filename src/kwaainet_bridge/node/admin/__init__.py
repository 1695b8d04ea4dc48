"""The node's admin side: HTTP for the operator. It costs next to nothing until somebody asks.

Clients use :mod:`.sockets` and :mod:`.tokens`, which import nothing large.
"""
