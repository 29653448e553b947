"""Tests written from the requirements alone, without a look at the code that they test."""
