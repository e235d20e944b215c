"""What `tools/doctor.py` looks at on the user's own machines: one file a check."""
