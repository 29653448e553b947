"""conduit measured beside what its users would take instead; see README.md."""
