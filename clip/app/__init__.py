"""What people meet: the `clip` command."""
