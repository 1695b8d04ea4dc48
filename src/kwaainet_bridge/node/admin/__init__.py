"""The node's admin side: HTTP for the operator. It costs next to nothing until somebody asks."""

from __future__ import annotations

from kwaainet_bridge.node.admin.server import AdminServer, open_admin

__all__ = ["AdminServer", "open_admin"]
