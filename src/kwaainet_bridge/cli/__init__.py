"""The command line: ``kwaainet-bridge``."""

from kwaainet_bridge.cli.app import main

__all__ = ["main"]
