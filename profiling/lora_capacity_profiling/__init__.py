"""Measuring a real vLLM server: load, metrics and the profile folder that a calibration is fitted from.

Nothing here imports JAX, so that it runs beside a server without taking memory on its GPU.
"""
