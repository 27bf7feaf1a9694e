"""Merging a LoRA adapter into its base weight by weight, quantizing and verifying the result."""
