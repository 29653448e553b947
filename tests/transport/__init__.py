"""The asyncio half: tasks, calls, handlers, messages and connections, most of it without a socket."""
