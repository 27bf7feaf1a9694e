"""Files of models and adapters, checked before anything acts on them; a folder of the shared floor."""
