"""Stage 1: build and run a teacher, reduce on the device, feed the writer."""
