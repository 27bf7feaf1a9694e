"""Chat with a model in the terminal, and measure how fast it generates."""
