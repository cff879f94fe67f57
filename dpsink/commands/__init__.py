"""One module a command of `dpsink`: what it is called, what it asks, what it shows."""
