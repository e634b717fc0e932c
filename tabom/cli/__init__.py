"""The `tabom` command: its arguments, and one module for each command."""
