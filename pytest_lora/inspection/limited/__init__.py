"""Work on what strangers wrote, done first in a process of its own whose time and memory are limited.

There is one bound, and one way to keep it: no expression is recognised as harmful, and none is trusted.
"""
