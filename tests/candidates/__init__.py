"""Kernels that wait for a measurement: see README.md beside this file."""
