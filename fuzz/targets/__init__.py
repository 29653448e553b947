"""What is fuzzed. A target has `run(data)`, which raises when something is wrong, and `seeds()`."""
