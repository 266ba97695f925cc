"""Rules of Acme, one a file."""
