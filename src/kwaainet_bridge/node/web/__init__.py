"""HTTP that a node serves in its own event loop: sockets, tokens, connections. Knows nothing of what is served."""
