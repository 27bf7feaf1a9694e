"""QLoRA training: from flags and data to an adapter directory."""
