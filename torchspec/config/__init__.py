"""Typed configuration: YAML plus dotted overrides, unknown keys refused with the nearest valid name."""
