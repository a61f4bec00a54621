"""The decode loop: slots of sequences, and the step propose, verify, accept, commit."""
