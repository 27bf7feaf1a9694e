"""Judge what training or quantizing did: answers and losses of two models on the same prompts, and one report."""
