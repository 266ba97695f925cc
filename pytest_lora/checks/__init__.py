"""Checks: inspect, judge, report. Each returns a Report and leaves everything as it was."""
