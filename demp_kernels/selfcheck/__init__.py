"""What the package says of its own reliability, measured where it is installed."""
