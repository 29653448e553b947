"""A session that goes on over one link after the other, simulated without I/O; `make simulate`."""
