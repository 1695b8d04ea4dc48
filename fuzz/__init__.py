"""Coverage-guided fuzzing of everything that reads bytes from a peer. See docs/reliability.md."""
