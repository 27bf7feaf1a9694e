"""Tools for developers and to_glm, each run as a module from the project's directory: `python -m tools.to_glm`."""
