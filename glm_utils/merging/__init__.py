"""Merging a LoRA adapter into its base model weight by weight, quantizing and verifying the result."""
