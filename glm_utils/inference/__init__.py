"""Talking to a model in the terminal, and measuring how fast it generates."""
