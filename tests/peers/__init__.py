"""conduit and programs that others have written; `make peers` fetches them and runs these."""
