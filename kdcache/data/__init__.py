"""Samples, views, keys and the data SPECs: what both stages know about a dataset."""
