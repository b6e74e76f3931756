"""The files between the stages: format 1, readable with numpy and without torch."""
