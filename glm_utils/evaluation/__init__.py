"""Judge what training or quantizing did: answers and losses of two models on the same prompts, and one report."""

NUM_SAMPLES, MAX_NEW_TOKENS = 100, 256  # by default
