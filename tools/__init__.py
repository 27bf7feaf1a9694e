"""Developer tools, and to_glm for users; run from the project's directory as modules: `python -m tools.to_glm`."""
