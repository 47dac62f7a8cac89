"""Measuring on the device: rounds and statistics (timing), and one module a runtime."""
