"""Rules of the stage recipe: what only the file that describes a run can show."""
