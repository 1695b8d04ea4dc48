"""Sans-IO codecs: bytes in, values out, or :class:`~kwaainet_bridge.errors.RemoteError`. No I/O, no clock."""
