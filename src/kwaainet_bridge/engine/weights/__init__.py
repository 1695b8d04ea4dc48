"""Weights of hub repositories on their way to this machine: what is fetched, kept, checked, and removed for others."""
