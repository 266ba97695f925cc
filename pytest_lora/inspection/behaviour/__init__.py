"""Behaviour: what a model does when it is saved, merged, padded or switched off, tried on copies, as facts."""
