"""The part of the library that does no I/O, bytes in and events and bytes out."""
