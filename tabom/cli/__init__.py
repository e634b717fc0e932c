"""The `tabom` command: arguments, and one module a command."""
