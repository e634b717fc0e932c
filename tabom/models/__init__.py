"""Models and the conventions of their families."""
