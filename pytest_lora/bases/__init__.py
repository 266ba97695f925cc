"""Bases: the small pretrained one in the wheel, and models in a local folder."""
