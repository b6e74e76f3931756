"""This process: its signals, standard streams and rank."""
