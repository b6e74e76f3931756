"""Teachers and students: what a SPEC builds, their weights, and what is asked of them first."""
