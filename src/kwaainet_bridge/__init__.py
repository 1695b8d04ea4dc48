"""One node for two volunteer networks that serve large language models."""

__version__ = "0.1.0"
