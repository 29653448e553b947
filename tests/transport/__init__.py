"""The asyncio half: tasks, calls, handlers, messages, connections; most of it without a socket."""
