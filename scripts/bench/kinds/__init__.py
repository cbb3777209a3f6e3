"""A recipe of each kind of teacher, run to its end on the quickstart's models."""
